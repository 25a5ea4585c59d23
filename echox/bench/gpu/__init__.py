"""Measures one GPU in one command, with torch and transformers alone; at toy size all of it runs on a CPU as well.

Here are the cells, what they measure, and the process that survives them. What a step is, and what is switched off in
it, is the room's above; no module here imports Ray, MLflow, DeepSpeed or pydantic, which a lent machine may lack.
"""
