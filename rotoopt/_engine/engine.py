"""The engine: everything that happens before, in and after a backward pass, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rotoopt._capture import wiring
from rotoopt._capture.capture import Capture
from rotoopt._capture.fork import BackwardPass, Fed, Fork, Met
from rotoopt._capture.graph import made_by, taps_of, terms
from rotoopt._capture.representation import RotatedDims
from rotoopt._engine.arguments import Losses, check_backbone_loss, check_losses, check_rep, warn_of_frozen, warn_user
from rotoopt._engine.memory import Memory
from rotoopt._engine.record import StepRecord
from rotoopt._engine.turning import partial_cosines, rotation_gradients
from rotoopt._rotation.rotations import Rotations
from rotoopt._rotation.step import RotationGradient
from rotoopt._torch.private import backward_pass_id, running_roots
from rotoopt._torch.processes import Processes
from rotoopt.weighting import Measurements, Weighting
from rotoopt.weighting._gradients import JoinedGradients, TaskGradients, task_mask
from rotoopt.weighting._measurements import joined, joined_across
