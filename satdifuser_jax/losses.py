"""Losses of the heads, as sums and weights: (loss_sum, weight_sum) add up exactly over batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def cross_entropy(logits, labels, *, ignore_index: int = -100, mask=None):
    """Softmax cross-entropy of logits [B, ..., K] and int labels [B, ...], in nats.

    Elements labelled `ignore_index` and rows with mask [B] False count for nothing.
    Returns (sum over counted elements, their number).
    """
    counted = labels != ignore_index
    if mask is not None:
        counted &= mask.reshape(-1, *[1] * (labels.ndim - 1))
    chosen = jnp.where(counted, labels, 0).astype(jnp.int32)
    log_likely = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    each = -jnp.take_along_axis(log_likely, chosen[..., None], -1)[..., 0]
    weight = counted.astype(jnp.float32)
    return (each * weight).sum(), weight.sum()


def binary_cross_entropy(logits, labels, *, mask=None):
    """Sigmoid cross-entropy of logits [B, K] and multi-hot labels [B, K]; weight: entries."""
    logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
    each = jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    weight = jnp.ones_like(each)
    if mask is not None:
        weight *= mask.astype(jnp.float32)[:, None]
    return (each * weight).sum(), weight.sum()


def head_loss(spec, logits, aux, labels, *, mask=None):
    """(loss_sum, weight_sum) of a head; with balance_weight > 0 the balance of its experts too."""
    if spec.task == "multi_label_classification":
        total, weight = binary_cross_entropy(logits, labels, mask=mask)
    else:
        how = {"ignore_index": spec.ignore_index, "mask": mask}
        total, weight = cross_entropy(logits, labels, **how)
    if spec.balance_weight and "balance" in aux:
        total = total + spec.balance_weight * aux["balance"] * weight
    return total, weight


def check_labels(labels, num_classes: int, *, ignore_index: int = -100, source: str = "labels"):
    """Raises ValueError when a class index on the host is outside 0..K-1 and not ignored.

    On a device such an index would be clipped or read as another class without a word.
    """
    labels = np.asarray(labels)
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= num_classes))]
    if wrong.size:
        raise ValueError(
            f"{source}: found class {int(wrong[0])} in {wrong.size} elements, but num_classes is "
            f"{num_classes} (0 to {num_classes - 1}). Set num_classes, or ignore_index for no-data"
        )
