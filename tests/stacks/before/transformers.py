import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **SIZES))
tokens = torch.arange(8)
data = [{"input_ids": tokens, "labels": tokens}] * 64
