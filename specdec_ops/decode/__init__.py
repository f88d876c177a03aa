"""Decoding with drafts: the engine, and what goes in and comes out.

Engine      decodes prompts with a target, a draft and a rule: generate, stream, submit / step / cancel
Sampling    what a request asks for: temperature, filters, seed, stops
Result      an answer: text, tokens, why it ended, logprobs, stats
Chunk       a piece of an answer while it grows
Decoder     a decoder-only transformer on this package's ops, from plain weights
Cache       paged keys and values, with reference counts
Rows        the rows of a pass: tokens, trees, where they stand
chat_prompt  a question in the chat template of a target's tokenizer
"""

from .cache import Cache as Cache
from .decoder import Decoder as Decoder
from .diagnose import Diagnosis as Diagnosis
from .engine import Engine as Engine
from .model import Model as Model
from .result import Chunk as Chunk
from .result import Result as Result
from .result import Stats as Stats
from .rows import Output as Output
from .rows import Rows as Rows
from .rows import Shape as Shape
from .sampling import Sampling as Sampling
from .text import chat_prompt as chat_prompt
