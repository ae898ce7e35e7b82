from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

words = ["<pad>", "a", "small", "text"]
plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
model = SentenceTransformer(modules=[StaticEmbedding(plain, embedding_dim=8)], device="cpu")
data = Dataset.from_list([{"anchor": "a text", "positive": "a small text"}] * 64)
