"""Generated from `proto/lora_gateway/v1`; `make proto` writes the modules beside this one."""
