"""The gRPC edge: knows protobuf and grpc, knows neither torch nor vLLM."""
