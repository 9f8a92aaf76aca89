"""What a merge method is. The engine, not the method, decides chunks and devices.

Shape legend: C contributions (clients), D entries of whatever scope is merged at once, m rows, n
columns of a module's weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from anabranch.aggregation.chunk import Chunk, matrix_shape
from anabranch.aggregation.finite import check_finite, check_floating
from anabranch.aggregation.kernels.rows import WEIGHTED_SUM, all_worthwhile, has_kernel, load
from anabranch.aggregation.ranks import ALONE, Ranks
from anabranch.aggregation.sample import positions
from anabranch.aggregation.statistics import Draw, Statistic, gather_statistics
from anabranch.aggregation.whole import InMemory
from anabranch.vectors.importance import Over, normalised
from anabranch.vectors.task_vector import Delta, Held, held, norm, scaled

Scope = Literal["entry", "tensor", "model"]


class MethodConfig(BaseModel):
    """A method's parameters. Subclasses add fields, each with a docstring."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True)
class MergeMethod:
    """One way to merge C task vectors into one.

    Exactly one of ``merge``, ``coefficients`` and ``matrices`` is set.

    Attributes:
        name: Name in recipes, unique in the registry.
        config: Its parameters.
        scope: What the method must see before it can decide an entry: the entry alone, its whole
            tensor, or the whole model. A config field ``scope``, where there is one, decides.
        merge: ``merge(deltas_CD, weights_C, config, **statistics, **draws) -> merged_D``, called on
            chunks of consecutive rows of one module, fp32 and not to be written to, with weights in
            fp64 on the CPU.
        statistics: What the engine gathers over the scope in first passes and hands to ``merge`` as
            keywords, in the order in which they build on each other.
        draws: What is drawn per entry and handed to ``merge`` as keywords.
        needs_importance: Whether ``merge`` takes ``importances_CD``: how much each entry matters to
            its contribution, zero or more. A config field ``normalise``, where there is one, says
            over what the engine brings each contribution's to a mean of 1.
        whole_tensors: Whether ``merge`` ranks a tensor's entries, and so gets a ``Whole``: one
            contribution's tensor after the other (scope "tensor"). It then gives the whole tensor,
            and nothing but weights and parameters is handed to it besides.
        whole_vectors: Whether a vector is one row, for methods that look at rows. Else it is cut
            wherever the budget says.
        coefficients: ``coefficients(weights_C, gram_CC, config) -> coefficients_C`` for methods
            whose result is Σ c_i·ΔW_i: the engine then never forms ΔW. ``gram_CC`` holds the fp64
            inner products of the task vectors over the scope, None unless ``needs_gram``.
        needs_gram: Whether ``coefficients`` reads the Gram matrix (scope "tensor" or "model"), or
            ``merge`` takes it as the keyword ``gram_CC`` (scope "model").
        needs_names: Whether ``coefficients`` takes ``names``, what the contributions are called.
        sample: With ``coefficients``: how many entries of the scope it takes as the keyword
            ``sample_CS``, at a configuration, drawn by its field ``seed`` (scope "model").
        form: The method as another kind where its configuration asks for what this kind cannot do,
            such as noise on each entry of a sum of products; None where it stays this one.
        matrices: ``matrices(deltas, weights_C, config) -> merged`` for methods that see a weight
            matrix as one: called once per module of two dimensions with its task vectors, as
            factors or entries, and positive weights of mean 1. It returns factors if it was given
            factors only. Parameters of other dimensions get the weighted mean.
        mean_norm: The result of ``matrices`` is a sum: the engine sums the other parameters too,
            and brings the merged model to the mean norm of the task vectors (scope "model").
        matrix_copies: With ``matrices``: copies of a dense module held per contribution.
        factors: With ``merge``: merges the A and the B of the contributions apart (a baseline:
            biased on ΔW). With ``matrices``: takes the adapters' own factors, not those of the
            task vectors against the start.
        weigh: ``weigh(weights_C, norms_C) -> weights_C``, with ``merge`` and ``factors``: weights
            in a module by the norms ‖B_i·A_i‖. Ranks may then differ; lower ones are padded with
            zeros.
        signed_weights: Whether negative weights, and weights that sum to zero, mean something.
        kernel: Where the same merge stands fused for large modules on the CPU, as
            ``module:function``: ``function(chunk, weights_C, config, **statistics) -> merged_D``,
            which makes its own draws. The same name in the package ``gpu`` beside that module is
            what a GPU runs, where it exists.
        ternary: Where the same merge of a large module stands for task vectors that are all sparse
            ternary, as ``module:function``: ``function(updates, weights_C, config, device) ->
            merged_D``. Not used where statistics are over the model. Linear methods have one in
            common.
    """

    name: str
    config: type[MethodConfig]
    scope: Scope
    merge: Callable[..., Tensor] | None = None
    statistics: tuple[Statistic, ...] = ()
    draws: tuple[Draw, ...] = ()
    needs_importance: bool = False
    whole_tensors: bool = False
    whole_vectors: bool = False
    coefficients: Callable[..., Tensor] | None = None
    needs_gram: bool = False
    needs_names: bool = False
    sample: Callable[[Any], int] | None = None
    form: Callable[[Any], MergeMethod | None] | None = None
    matrices: Callable[[Sequence[Held], Tensor, Any], Held] | None = None
    mean_norm: bool = False
    matrix_copies: int = 1
    factors: bool = False
    weigh: Callable[[Tensor, Tensor], Tensor] | None = None
    signed_weights: bool = False
    kernel: str | None = None
    ternary: str | None = None

    def __post_init__(self) -> None:
        kinds = (self.merge, self.coefficients, self.matrices)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError(
                f"method {self.name}: set exactly one of merge, coefficients and matrices"
            )
        gathers = bool(self.statistics) or self.needs_gram
        if gathers and self.scope == "entry":
            raise ValueError(
                f"method {self.name}: what it gathers is taken over a tensor or the model; "
                "set scope to one of them"
            )
        over_model = self.sample is not None or (self.needs_gram and self.merge is not None)
        if over_model and self.scope != "model":
            raise ValueError(
                f"method {self.name}: a sample, and a Gram matrix for merge, are of the whole "
                'model; set scope to "model"'
            )
        if (self.sample is not None or self.needs_names) and self.coefficients is None:
            raise ValueError(
                f"method {self.name}: names and a sample are handed to coefficients; set those"
            )
        handed = self.statistics or self.draws or self.needs_importance or self.kernel
        if handed and (self.merge is None or self.factors):
            raise ValueError(
                f"method {self.name}: statistics, draws and importance are handed to a merge of "
                "entries, which a kernel stands in for; leave them out, or set merge, not factors"
            )
        if self.whole_tensors and (
            self.merge is None or self.factors or handed or self.scope != "tensor"
        ):
            raise ValueError(
                f"method {self.name}: whole tensors are given to a merge of scope tensor, and "
                "nothing else; leave out statistics, draws, importance, kernel and factors"
            )
        if self.weigh is not None and (self.merge is None or not self.factors):
            raise ValueError(
                f"method {self.name}: weigh is for methods that merge A and B apart; "
                "leave it out, or set merge and factors"
            )
        keywords = [statistic.name for statistic in self.statistics]
        keywords += [draw.name for draw in self.draws]
        if len(set(keywords)) < len(keywords):
            raise ValueError(f"method {self.name}: {keywords} name one thing twice; rename it")

    def scope_of(self, config: MethodConfig) -> Scope:
        """The scope at a configuration: its field ``scope`` where there is one."""
        scope: Scope = getattr(config, "scope", self.scope)
        return scope

    def at(self, config: MethodConfig) -> MergeMethod:
        """The method as the kind that a configuration asks for; mostly this one."""
        return self if self.form is None else self.form(config) or self

    def normalise_of(self, config: MethodConfig) -> Over:
        """Over what importance has a mean of 1: the config's field ``normalise``, if any."""
        over: Over = getattr(config, "normalise", "none")
        return over

    def __call__(
        self,
        deltas_CD: Tensor,
        weights_C: Tensor | None = None,
        config: MethodConfig | None = None,
        *,
        module: str = "",
        importances_CD: Tensor | None = None,
        names: Sequence[str] | None = None,
    ) -> Tensor:
        """Merge entries held in memory, which are then the method's whole scope.

        Args:
            deltas_CD: Task vectors [C, D], or [C, m, n] for methods that look at rows or merge
                matrices (of which [C, D] are vectors and get their mean); floating point.
            weights_C: Weight per contribution [C]; None counts each once.
            config: The method's parameters; None takes its defaults.
            module: Names the seeded draws.
            importances_CD: For methods that need it: how much each entry matters, in the shape of
                the task vectors; None takes all entries to matter alike.
            names: What the contributions are called, for methods that single one out; None calls
                them "contribution 0" and so on.

        Returns:
            Merged entries in the shape of one contribution, in fp32.

        Raises:
            ValueError: Weights the method cannot use, too few contributions for it, or numbers that
                are not floating-point or not finite; names the contribution.
        """
        config = self.config() if config is None else config
        if (form := self.at(config)) is not self:
            return form(deltas_CD, weights_C, config, module=module, names=names)
        count, shape = deltas_CD.shape[0], deltas_CD.shape[1:]
        for index, delta in enumerate(deltas_CD):
            check_floating(delta, f"contribution {index}")
            check_finite(delta, f"contribution {index}")
        weights_C = self.check_weights(
            torch.ones(count, dtype=torch.float64) if weights_C is None else weights_C, count
        )
        if self.matrices is not None:
            merged = self.merge_modules({module: list(deltas_CD)}, weights_C, config)[module]
            assert isinstance(merged, Tensor)
            return merged
        rows, columns = matrix_shape(shape, self.whole_vectors)
        flat_CD = deltas_CD.detach().float().reshape(count, rows * columns)
        if self.whole_tensors:
            assert self.merge is not None
            return self.merge(InMemory(flat_CD), weights_C, config).view(shape)
        fused = all_worthwhile(flat_CD)
        chunk = Chunk(module, 0, columns, flat_CD, fused)
        if self.needs_importance:
            given_CD = torch.ones_like(flat_CD) if importances_CD is None else importances_CD
            over = self.normalise_of(config)
            weighed = [held(normalised({"": one}, over)[""]) for one in given_CD]
            flat = [one.flatten().float() for one in weighed if isinstance(one, Tensor)]
            chunk = replace(chunk, importances_CD=torch.stack(flat))
        if self.merge is not None:
            found = gather_statistics(self.statistics, [chunk], rows * columns, weights_C, config)
            if self.needs_gram:
                found["gram_CC"] = inner_products(chunk.deltas_CD).cpu()
            return self.merge_chunk(chunk, weights_C, config, found).view(shape)
        assert self.coefficients is not None
        gram_CC = inner_products(chunk.deltas_CD).cpu() if self.needs_gram else None
        handed: dict[str, Any] = {}
        if self.needs_names:
            called = [f"contribution {index}" for index in range(count)]
            handed["names"] = called if names is None else names
        if self.sample is not None:
            given = {module: flat_CD.shape[1]}
            (positions_S,) = positions(given, self.sample(config), config).values()
            handed["sample_CS"] = flat_CD[:, positions_S]
        coefficients_C = self.coefficients(weights_C, gram_CC, config, **handed)
        sum_up = load(WEIGHTED_SUM, flat_CD.device) if fused else combine
        merged_D: Tensor = sum_up(flat_CD, coefficients_C)
        return merged_D.view(shape)

    def merge_chunk(
        self, chunk: Chunk, weights_C: Tensor, config: MethodConfig, found: Mapping[str, Tensor]
    ) -> Tensor:
        """Merged entries of a chunk [D], with the statistics given and the draws made for it."""
        assert self.merge is not None
        device = chunk.rows[0].device
        if chunk.fused and self.kernel is not None and has_kernel(self.kernel, device):
            merged_D: Tensor = load(self.kernel, device)(chunk, weights_C, config, **found)
            return merged_D
        drawn = {draw.name: draw.make(chunk, config) for draw in self.draws}
        if self.needs_importance:
            assert chunk.importances_CD is not None
            drawn["importances_CD"] = chunk.importances_CD
        return self.merge(chunk.deltas_CD, weights_C, config, **found, **drawn)

    def merge_modules(
        self,
        modules: Mapping[str, Sequence[Delta]],
        weights_C: Tensor,
        config: MethodConfig,
        ranks: Ranks = ALONE,
    ) -> dict[str, Held]:
        """A whole model by ``matrices``.

        Weights are relative: equal ones count each task vector once, as the papers do, and a
        contribution of weight zero is left out.

        Args:
            modules: By module, one change per contribution.
            weights_C: Checked weights [C].
            config: The method's parameters.
            ranks: Who has the model's other modules.

        Returns:
            The merged change per module.
        """
        merged = {m: self.merge_matrix(deltas, weights_C, config) for m, deltas in modules.items()}
        if not self.mean_norm:
            return merged
        norms = {module: norm(delta) for module, delta in merged.items()}
        factor = self.norm_factor(modules, weights_C, norms, ranks)
        return {module: scaled(delta, factor) for module, delta in merged.items()}

    def merge_matrix(
        self, deltas: Sequence[Delta], weights_C: Tensor, config: MethodConfig
    ) -> Held:
        """One module by ``matrices``; with ``mean_norm``, before the model's norm is mended."""
        assert self.matrices is not None
        used, relative_C = _relative(weights_C)
        parts = [held(deltas[index]) for index in used]
        if len(parts[0].shape) == 2:
            return self.matrices(parts, relative_C, config)
        entries = torch.stack([part for part in parts if isinstance(part, Tensor)])
        return combine(entries, relative_C / (1 if self.mean_norm else len(used)))

    def norm_factor(
        self,
        modules: Mapping[str, Sequence[Delta]],
        weights_C: Tensor,
        merged_norms: Mapping[str, float],
        ranks: Ranks = ALONE,
    ) -> float:
        """What brings merged modules of these norms to the mean norm of the task vectors."""
        used, relative_C = _relative(weights_C)
        # Module by module: stored ones have the base's entries in common.
        by_module = ranks.union(
            {m: [norm(deltas[index]) for index in used] for m, deltas in modules.items()}
        )
        norms = [math.hypot(*of_one) for of_one in zip(*by_module.values(), strict=True)]
        mean = math.fsum(w * x for w, x in zip(relative_C.tolist(), norms, strict=True)) / len(used)
        reached = math.hypot(*ranks.union(merged_norms).values())
        return mean / reached if reached else 0.0

    def check_weights(self, weights_C: Tensor, count: int) -> Tensor:
        """The weights in fp64 on the CPU, once they are known to make sense.

        Raises:
            ValueError: Wrong number of weights, one that is not finite or is negative, or all zero.
        """
        weights_C = weights_C.detach().to("cpu", torch.float64)
        if weights_C.shape != (count,):
            raise ValueError(
                f"weights: {weights_C.numel()} for {count} contributions; give one for each"
            )
        shown = [float(weight) for weight in weights_C]
        if not bool(weights_C.isfinite().all()):
            raise ValueError(f"weights: {shown} are not all finite; drop that contribution")
        if not self.signed_weights and (bool((weights_C < 0).any()) or not bool(weights_C.any())):
            raise ValueError(
                f"weights: {self.name} divides by their sum, so {shown} cannot be used; "
                "give weights of zero or more, one of them above zero"
            )
        return weights_C


def _relative(weights_C: Tensor) -> tuple[list[int], Tensor]:
    """Who has a say, and their weights with a mean of 1."""
    used = weights_C.nonzero().flatten().tolist()
    return used, weights_C[used] * len(used) / weights_C.sum()


def inner_products(deltas_CD: Tensor) -> Tensor:
    """Gram matrix ⟨τ_i, τ_j⟩ [C, C] in fp64.

    fp64 is not a luxury: distances are small differences of large inner products, and in fp32 a
    true squared distance of .4 came out as 10 to 58. Products of two fp32 numbers are exact in
    fp64.
    """
    wide_CD = deltas_CD.double()
    return wide_CD @ wide_CD.T


def squared_distances(gram_CC: Tensor) -> Tensor:
    """‖τ_i − τ_j‖² [C, C] from inner products.

    The Gram matrix is not centred first: that would gain no digit, and one contribution of a huge
    norm, which the mean carries to every other, would drown the distances among the rest.
    """
    norms_C = gram_CC.diagonal()
    return (norms_C[:, None] + norms_C[None, :] - 2 * gram_CC).clamp(min=0).fill_diagonal_(0)


def cosines(gram_CC: Tensor) -> Tensor:
    """Cosine similarities [C, C] from inner products; 0 for a task vector that is zero."""
    norms_C = gram_CC.diagonal().clamp(min=0).sqrt()
    scale_C = torch.where(norms_C > 0, 1 / norms_C, 0.0)
    return (gram_CC * scale_C[:, None] * scale_C[None, :]).clamp(-1, 1)


def combine(deltas_CD: Tensor, coefficients_C: Tensor) -> Tensor:
    """Σ c_i τ_i [D], in fp32, added in the order of the contributions."""
    merged_D = torch.zeros_like(deltas_CD[0], dtype=torch.float32)
    for delta_D, coefficient in zip(deltas_CD, coefficients_C.tolist(), strict=True):
        if coefficient:
            merged_D.add_(delta_D, alpha=coefficient)
    return merged_D
