"""The measures of one trained arm."""

import resource
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gated_attention.analysis import inspect_model
from gated_attention.evaluate import held_out_loss
from gated_attention.studies.record import Measure, read_metrics
from gated_attention.train.data import PackedData
from gated_attention.train.trainer import TrainConfig

INSPECTED_TOKENS = 65_536
"""How much held-out text sinks, activations and gates are measured on."""
