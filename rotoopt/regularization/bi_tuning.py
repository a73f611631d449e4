"""Bi-Tuning: contrasts every sample with keys of all classes, before the classifier and after a projector."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import pad
from torch.optim.swa_utils import get_ema_multi_avg_fn

from rotoopt._capture.hooks import hook_of
from rotoopt._capture.representation import rotated
from rotoopt._torch.processes import Processes
from rotoopt.regularization._contrastive_encoder import Classifier, ClassifierHead, unit, with_one
from rotoopt.regularization._inputs import at_least_float32, check_labels
from rotoopt.regularization._key_queues import enqueue_

__all__ = ["BiTuning", "Classifier"]


class BiTuning(nn.Module):
    r"""Contrasts samples with a queue of keys per class: K positives of their own, (C - 1) K negatives of the others.

    Keys come from a second encoder, a moving average of the first: :math:`\theta_k \leftarrow m \theta_k + (1 - m)
    \theta_q` in every forward pass. The projector's term compares z with the keys of earlier batches; the classifier's
    compares the weights w of the label's class with [h, 1] and, in the queue, with keys of this batch as well. Keys
    and, in the classifier's term, the weights have no gradient, so that this term trains the backbone. Loss (with
    trade-off 1)::

        y, logits_z, logits_y, labels_c = bi_tuning(x_q, x_k, labels)  # two augmentations of a batch
        contrast = nn.KLDivLoss(reduction="batchmean")
        loss = F.cross_entropy(y, labels) + contrast(logits_z, labels_c) + contrast(logits_y, labels_c)

    With ``RotoGradOptimizer`` there are two tasks, as in the example. Queued features are not rotated, so they stay
    valid when the rotations are updated. Build the optimizer after this module.

    A slot of the queue is used from the step after it was filled on, so the first step consists of the cross-entropy
    only. To resume, save the state dict of this module, not only that of the encoder.

    In distributed training, each process enqueues the keys of all, so that all queues are equal. Their batches must
    have the same size (``drop_last=True``). Wrap this module in DistributedDataParallel, not an encoder.

    Args:
        encoder_q: Query encoder, which is trained.
        encoder_k: Key encoder, with the same architecture. It receives the weights of ``encoder_q`` and is frozen.
            Keep its parameters in float32: in half precision, a moving average with m = 0.999 rounds to no change.
        num_classes: C.
        K: Keys per class.
        m: Momentum of the moving average.
        T: Temperature.
        process_group: The processes that share a batch. ``None``: the default group, if there is one.

    Raises:
        TypeError: If an encoder is not a :class:`Classifier`.
        ValueError: If the encoders differ, share parameters, or have another number of classes, ``encoder_k`` was
            copied with a rotation, or an option is out of range.

    Example:
        >>> import copy
        >>> from torch.nn import functional as F
        >>> from rotoopt import RotoGradOptimizer
        >>> encoder = Classifier(nn.Linear(3, 8), num_classes=2, projection_dim=4)
        >>> bi_tuning = BiTuning(encoder, copy.deepcopy(encoder), num_classes=2, K=5)
        >>> optimizer = RotoGradOptimizer(torch.optim.SGD(encoder.get_parameters(0.1)), heads=encoder.heads)
        >>> x_q, x_k, labels = torch.randn(6, 3), torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])
        >>> y, logits_z, logits_y, labels_c = bi_tuning(x_q, x_k, labels)
        >>> contrast = nn.KLDivLoss(reduction="batchmean")
        >>> classifier_loss = F.cross_entropy(y, labels) + contrast(logits_y, labels_c)
        >>> optimizer.step({"classifier": classifier_loss, "projector": contrast(logits_z, labels_c)})
        >>> y.shape, logits_z.shape, logits_y.shape, labels_c.shape
        (torch.Size([6, 2]), torch.Size([6, 11]), torch.Size([6, 11]), torch.Size([6, 11]))

    Source: Zhong et al., Bi-tuning of Pre-trained Representations, 2020; ``tllib.regularization.bi_tuning``, with the
    same numbers once the queues are full. Its state dicts can be loaded. Differences:

    - Empty slots of the queue are ignored; there, they contain random vectors that count as positives.
    - Queues start empty, are updated without loops or synchronization, and are equal on all processes.
    - A key that is not finite leaves its slot empty; there, it makes every later loss NaN.
    - Parameters are averaged in place and by name, and buffers, such as those of batch norm, are copied.
    - Logits are computed in float32, outside autocast.
    - Encoders that do not match, invalid labels, and eval mode raise descriptive errors.
    """

    queue_h: Tensor
    queue_z: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        encoder_q: Classifier,
        encoder_k: Classifier,
        num_classes: int,
        K: int = 40,
        m: float = 0.999,
        T: float = 0.07,
        *,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_encoders(encoder_q, encoder_k, num_classes)
        if K < 1 or not 0 <= m <= 1 or not T > 0:
            raise ValueError(f"`K` must be at least 1, `m` in [0, 1], and `T` positive, got K={K}, m={m} and T={T}.")
        self.num_classes, self.K, self.m, self.T = num_classes, K, m, T
        self.encoder_q = encoder_q
        self.encoder_k = encoder_k.requires_grad_(False)
        self.encoder_k.load_state_dict(encoder_q.state_dict())
        like = encoder_q.head.weight.detach()
        self.register_buffer("queue_h", like.new_zeros(encoder_q.features_dim + 1, num_classes, K))
        self.register_buffer("queue_z", like.new_zeros(encoder_q.projection_dim, num_classes, K))
        self.register_buffer("queue_ptr", torch.zeros(num_classes, dtype=torch.long, device=like.device))
        self._processes = Processes(process_group)

    def forward(self, im_q: Tensor, im_k: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return logits y and, for both contrastive terms, log-probabilities; update key encoder and queues.

        Args:
            im_q: Inputs of the query encoder. Shape ``(b, ...)``.
            im_k: Inputs of the key encoder: other views of the same samples. Shape ``(b, ...)``.
            labels: Their classes. Shape ``(b,)``.

        Returns:
            y_q ``(b, C)``; logits_z and logits_y, log-probabilities of the sample's own key, the K of its class, and
            those of the other classes in order; labels_c, their target probabilities, uniform over the own key and the
            filled slots of the class. All three ``(b, 1 + C K)``. Empty slots have probability zero.

        Raises:
            RuntimeError: If it is called in eval mode.
            ValueError: If numbers of samples differ, or a label is not a class.
        """
        self._check(im_q, im_k, labels)
        labels = labels.long()
        y_q, z_q, h_q = self.encoder_q(im_q)
        self._update_key_encoder()
        z_k, h_k = self._encode_keys(im_k)
        # Empty slots are zero, and the last feature of a key is 1 / ||[h, 1]||.
        filled = self._own_class_first((self.queue_h[-1] > 0).expand(len(labels), -1, -1), labels)
        with torch.autocast(labels.device.type, enabled=False):
            keys_z = self.queue_z.to(z_q.dtype, copy=True)  # the backward pass needs the present values
            logits_z = self._log_probabilities((z_q * z_k).sum(dim=1), z_q @ keys_z.flatten(1), filled, labels)
            self._enqueue(h_k, z_k, labels)
            weights, unrotated = (each.index_select(0, labels) for each in self._class_weights())
            keys_h = self.queue_h.to(h_q.dtype).flatten(1)
            logits_y = self._log_probabilities((weights * h_q).sum(dim=1), unrotated @ keys_h, filled, labels)
        positives = pad(filled[:, : self.K].to(logits_z.dtype), (1, 0), value=1.0)
        labels_c = pad(positives / positives.sum(dim=1, keepdim=True), (0, (self.num_classes - 1) * self.K))
        return y_q, logits_z, logits_y, labels_c

    def _check(self, im_q: Tensor, im_k: Tensor, labels: Tensor) -> None:
        if not self.training or not self.encoder_q.training:
            raise RuntimeError(
                "BiTuning must be called in training mode, got eval mode. Call train() after an evaluation; for "
                "predictions, call its encoder_q."
            )
        if len(im_q) != len(im_k):
            raise ValueError(f"`im_q` and `im_k` must be views of the same samples, got {len(im_q)} and {len(im_k)}.")
        check_labels(labels, len(im_q), self.num_classes)
        if self._processes.count > 1 and labels.device.type == "cpu":  # on a GPU, this would synchronize
            sizes = self._processes.gather(torch.tensor([len(labels)])).flatten().tolist()
            if len(set(sizes)) > 1:
                raise ValueError(
                    f"The batches of all processes must have the same size, got {sizes}. Each enqueues the keys of "
                    "all: drop a smaller last batch with drop_last=True."
                )

    @torch.no_grad()
    def _update_key_encoder(self) -> None:
        query, key = dict(self.encoder_q.named_parameters()), dict(self.encoder_k.named_parameters())
        average = get_ema_multi_avg_fn(self.m)  # type: ignore[no-untyped-call]
        average(tuple(key.values()), tuple(query[name] for name in key), 0)
        buffers = dict(self.encoder_q.named_buffers())
        for name, buffer in self.encoder_k.named_buffers():
            buffer.copy_(buffers[name])

    @torch.no_grad()
    def _encode_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys z, from the projector with its current rotation, and [h, 1], not rotated."""
        rep = self.encoder_k.represent(x)
        return unit(self.encoder_k.projector(_rotated_for(self.encoder_q.projector, rep))), unit(with_one(rep))

    def _own_class_first(self, keys: Tensor, labels: Tensor) -> Tensor:
        """Return ``keys``, shape ``(b, C, K)``, with the class of each sample before the others. ``(b, C K)``."""
        own = labels[:, None]
        others = torch.arange(self.num_classes - 1, device=labels.device)
        order = torch.cat([own, others + (others >= own)], dim=1)
        return keys.gather(1, order[:, :, None].expand(-1, -1, self.K)).flatten(1)

    def _log_probabilities(self, current: Tensor, queued: Tensor, filled: Tensor, labels: Tensor) -> Tensor:
        queued = self._own_class_first(queued.view(-1, self.num_classes, self.K), labels)
        # The lowest number instead of -inf: its product with the target probability zero is zero, not NaN.
        queued = torch.where(filled, queued / self.T, torch.finfo(queued.dtype).min)
        return torch.cat([current[:, None] / self.T, queued], dim=1).log_softmax(dim=1)

    @torch.no_grad()
    def _class_weights(self) -> tuple[Tensor, Tensor]:
        """Return the unit vectors of [w, b], for rotated features, and of [R'w, b], for features without rotation."""
        head = self.encoder_q.head
        weight, bias = at_least_float32(head.weight), head.bias[:, None]
        turned = _rotated_for(head, weight, inverse=True)
        return unit(torch.cat([weight, bias], dim=1)), unit(torch.cat([turned, bias], dim=1))

    @torch.no_grad()
    def _enqueue(self, h: Tensor, z: Tensor, labels: Tensor) -> None:
        """Append the keys of all processes to the ring buffers of their classes, in order."""
        keys = torch.cat([h, z], dim=1)
        if self._processes.count > 1:
            keys = self._processes.gather(keys).flatten(0, 1)
            labels = self._processes.gather(labels).flatten()
        keys = torch.where(keys.isfinite().all(dim=1, keepdim=True), keys, 0.0)
        h, z = torch.split(keys, [len(self.queue_h), len(self.queue_z)], dim=1)
        enqueue_([self.queue_h, self.queue_z], self.queue_ptr, [h, z], labels)


def _rotated_for(head: nn.Module, vectors: Tensor, *, inverse: bool = False) -> Tensor:
    """Return ``vectors``, shape ``(n, d)``, rotated by the rotation in front of ``head``, if any, or its inverse."""
    hook = hook_of(head)
    if hook is None or not hook.capture.rotations.rotate[hook.task]:
        return vectors
    matrix = hook.capture.rotations[hook.task]
    return rotated(vectors, matrix.mT if inverse else matrix, hook.capture.dims)


def _check_encoders(encoder_q: Classifier, encoder_k: Classifier, num_classes: int) -> None:
    for name, encoder in (("encoder_q", encoder_q), ("encoder_k", encoder_k)):
        if not isinstance(encoder, Classifier) or not isinstance(encoder.head, ClassifierHead):
            raise TypeError(
                f"`{name}` must be a bi_tuning.Classifier with its own head, got a {type(encoder).__name__}. Bi-Tuning "
                "needs the outputs of that class."
            )
        if encoder.num_classes != num_classes:
            raise ValueError(f"`{name}` must have num_classes={num_classes} outputs, got {encoder.num_classes}.")
    if not {id(param) for param in encoder_q.parameters()}.isdisjoint(map(id, encoder_k.parameters())):
        raise ValueError(
            "`encoder_k` must have parameters of its own, got some of `encoder_q`, which would be frozen with it. "
            "Make a copy: copy.deepcopy(encoder_q)."
        )
    query, key = ({name: tuple(each.shape) for name, each in e.state_dict().items()} for e in (encoder_q, encoder_k))
    different = [name for name in {**query, **key} if query.get(name) != key.get(name)]
    if different:
        found = ", ".join(f"{name}: {query.get(name)} and {key.get(name)}" for name in different[:5])
        raise ValueError(
            f"`encoder_q` and `encoder_k` must have the same parameters and buffers, got {found}. Use the same "
            "backbone and projection_dim, or make a copy: copy.deepcopy(encoder_q)."
        )
    if any(hook_of(head) is not None for head in encoder_k.heads.values()):
        raise ValueError(
            "`encoder_k` must not have rotations, got a copy of an encoder that has: they would not be updated. "
            "Copy the encoder before RotoGradOptimizer is built, or after its remove()."
        )
