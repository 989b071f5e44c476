"""Token shards: a folder of token ids that `gated-attention tokenize` writes and every trainer reads.

| file | what it holds |
|---|---|
| `part-00000.npy`, ... | token ids and nothing else: little-endian, no header (`np.memmap`, not `np.load`) |
| `part-00000.csv.gz`, ... | per document `start,end,bytes`: first id, one past its EOS, size of its text in UTF-8 |
| `tokenizer/` | the tokenizer, as `save_pretrained` wrote it |
| `tokens.json` | the index, a `TokenIndex`, written last: a folder without it is not finished |

Ids are `uint16` where the vocabulary fits, `uint32` otherwise. Documents stand in the order of their sources, each
followed by `eos_token_id`. A document lies whole in one shard. There is no BOS and no padding: a trainer that wants BOS
inserts it, and a reader finds documents by EOS alone, or by the tables.

OLMo-core's `NumpyFSLDataset` and its kin read the parts as they are, and the tables as the metadata of
documents. For its `TokenizerConfig`, take `bos_token_id=None`, because its readers otherwise expect a BOS at every
document, and for a tokenizer without padding `pad_token_id=eos_token_id`.
"""

from gated_attention.shards.index import Shard, TokenIndex, TokenizerRecord
from gated_attention.shards.mixture import Mixture, find_shards, mix
from gated_attention.shards.read import TokenShards, is_token_folder, open_shards

__all__ = [
    "Mixture",
    "Shard",
    "TokenIndex",
    "TokenShards",
    "TokenizerRecord",
    "find_shards",
    "is_token_folder",
    "mix",
    "open_shards",
]
