"""Training jobs: datasets, the queue, the training processes and their recipe.

Knows no gRPC and no vLLM. What needs an engine is handed in (`trainer/publisher.py`).
"""
