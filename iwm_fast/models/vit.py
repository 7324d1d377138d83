"""The encoder: a vision transformer over the visible patches of each image.

Learned prefix tokens (a class token, registers) may precede the patches of each image. They take part in the attention
of all blocks and end with the last one: only patches are returned. Positions are added to the patches, fixed or
learned, or rotate their queries and keys in every block; prefix tokens have none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iwm_fast import kernels
from iwm_fast.config.encoders import EncoderArchitecture
from iwm_fast.kernels.permutation import invert, take_rows
from iwm_fast.models.blocks import Block, Kept, Norm, rescale_blocks, run_blocks, wants_groups
from iwm_fast.models.exact_buffers import ExactBuffers
from iwm_fast.models.packing import Segments, interleave
from iwm_fast.models.positions import Rotation, rotation_table, sincos_positions

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "PatchEmbedding", "VisionTransformer"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0..1, as timm and torchvision
IMAGENET_STD = (0.229, 0.224, 0.225)


class PatchProjection(nn.Module):
    """The linear layer of the patch embedding, with its weight in the shape of timm's convolution."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, patch, patch))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.weight.view(width, -1))  # as a linear layer, which it is (MAE)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels (N, patch · patch · 3), channel last, to (N, D)."""
        return F.linear(pixels, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class PatchEmbedding(ExactBuffers):
    """Embed patches of uint8 images as tokens; subtracts ImageNet's mean and divides by its std in fp32 first."""

    scale: Tensor
    shift: Tensor

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = PatchProjection(patch, width)
        std = torch.tensor(IMAGENET_STD).repeat(patch * patch)
        mean = torch.tensor(IMAGENET_MEAN).repeat(patch * patch)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, images: Tensor, patches: Tensor | None = None, image_of_token: Tensor | None = None) -> Tensor:
        """Embed patches of uint8 images (B, S, S, 3) as (N, D) of the weights' type.

        `patches` and `image_of_token`, int64 (N,), select them, as in `kernels.patchify`; without them all, N = B · L.
        """
        dtype = self.proj.weight.dtype
        return self.proj(
            kernels.patchify(
                images, self.patch, self.scale, self.shift, dtype=dtype, patches=patches, image_of_token=image_of_token
            )
        )


class VisionTransformer(ExactBuffers):
    """Encoder of the visible patches of uint8 images; parameter names follow timm except for the blocks' MLPs.

    prefix: (P, D), the tokens before each image's patches, or None. pos_embed: (L, D), a parameter where positions are
    learned, a buffer where they are fixed, None for rope.
    """

    pos_embed: Tensor | None
    prefix: nn.Parameter | None

    def __init__(
        self,
        architecture: EncoderArchitecture,
        attention: str = "auto",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        shape = architecture.shape
        self.architecture = architecture
        self.image = architecture.image
        self.patch = architecture.patch
        self.width = shape.width
        self.heads = shape.heads
        self.attention = attention
        self.activation_checkpointing = activation_checkpointing
        self.patch_embed = PatchEmbedding(self.patch, shape.width)
        rope = architecture.positions == "rope"
        positions = None if rope else sincos_positions(shape.width, architecture.grid)
        if positions is not None and architecture.positions == "learned":
            self.pos_embed = nn.Parameter(positions)
        else:
            self.register_buffer("pos_embed", positions, persistent=False)
        self.blocks = nn.ModuleList(
            Block(shape.width, shape.heads, shape.mlp_ratio, attention, eps=architecture.norm_eps)
            for _ in range(shape.depth)
        )
        self.norm = Norm(shape.width, architecture.norm_eps)
        rescale_blocks(self.blocks)
        prefix = torch.empty(architecture.prefix_tokens, shape.width)
        self.prefix = nn.Parameter(nn.init.trunc_normal_(prefix, std=0.02)) if len(prefix) else None

    @property
    def patches(self) -> int:
        """L, the patches of a whole image."""
        return (self.image // self.patch) ** 2

    def forward(
        self,
        images: Tensor,
        patches: Tensor | None = None,
        segments: Segments | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """Return the tokens of the visible patches.

        Args:
            images: uint8 (B, S, S, 3).
            patches: int64 (N,), row-major indices of the visible patches of each image, packed; None: all.
            segments: of the N patches; needed with `patches`, not without.
            kept: without `patches`: the tokens to return, as rows of (B · L). The others end with the last attention.

        Returns:
            (N, D), packed in the order of `patches`, or the kept (Nk, D).

        Raises:
            ValueError: the images' shape or type is not the model's, or patches and segments do not match.

        """
        self._check(images, patches, segments)
        if patches is None or segments is None:
            return self._encode_whole(images, kept)
        if self.prefix is not None:
            return self._encode_after(self.prefix, images, patches, segments)
        image = segments.pixels_of_token
        # For attention with one call per length: sorted once here, blocks move no tokens.
        resort = not segments.is_sorted and wants_groups(self.blocks, segments)
        if resort:
            by_length = segments.by_length
            patches, image = patches[by_length.token_order], image[by_length.token_order]
            x = self._encode(self.embed(images, patches, image), by_length.segments, patches)
            return take_rows(x, by_length.token_rank, by_length.token_order)
        return self._encode(self.embed(images, patches, image), segments, patches)

    def all_tokens(self, images: Tensor) -> Tensor:
        """Return all tokens of whole images (B, S, S, 3) after the last normalisation: (B, P + L, D), prefix first."""
        self._check(images, None, None)
        x, segments, patches = self._embed_whole(images)
        return self._encode(x, segments, patches).unflatten(0, (len(images), segments.longest))

    def embed(self, images: Tensor, patches: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        """Return tokens (N, D) with their positions, of all patches or of those that int64 (N,) patches and
        image select.
        """
        tokens = self.patch_embed(images, patches, image)
        if self.pos_embed is None:
            return tokens
        positions = self.pos_embed.to(tokens.dtype)
        if patches is None:
            return (tokens.unflatten(0, (-1, self.patches)) + positions).flatten(0, 1)
        if isinstance(self.pos_embed, nn.Parameter):
            # Its gradient is an ordered sum, where index_select's would add by atomics.
            return tokens + F.embedding(patches, positions)
        return tokens + positions.index_select(0, patches)

    def _embed_whole(self, images: Tensor) -> tuple[Tensor, Segments, Tensor]:
        """Return the tokens of whole images, B · (P + L) of them, their segments, and the patch of each or −1."""
        x, prefix = self.embed(images), 0
        if self.prefix is not None:
            prefix = len(self.prefix)
            x = torch.cat([self.prefix.to(x.dtype).expand(len(images), -1, -1), x.unflatten(0, (-1, self.patches))], 1)
            x = x.flatten(0, 1)
        patches = torch.arange(-prefix, self.patches, device=images.device).clamp(min=-1).repeat(len(images))
        return x, Segments.uniform(len(images), prefix + self.patches, images.device), patches

    def _encode_whole(self, images: Tensor, kept: Kept | None) -> Tensor:
        x, segments, patches = self._embed_whole(images)
        if self.prefix is None:
            return self._encode(x, segments, patches, kept)
        prefix, every = len(self.prefix), self.patches
        if kept is None:
            seen = Segments.uniform(len(images), every, images.device)
            kept = Kept(torch.arange(seen.total, device=images.device), seen)
        rows = kept.rows + prefix * (kept.rows // every + 1)  # its image's prefix tokens, and those of earlier images
        return self._encode(x, segments, patches, Kept(rows, kept.segments))

    def _encode_after(self, prefix: Tensor, images: Tensor, patches: Tensor, segments: Segments) -> Tensor:
        """Encode packed patches, each image's after the prefix tokens (P, D)."""
        before = Segments.uniform(len(segments.lengths), len(prefix), segments.device)
        joined, places = interleave([before, segments])
        place = torch.cat(places)
        if not joined.is_sorted and wants_groups(self.blocks, joined):
            place, joined = joined.by_length.token_rank[place], joined.by_length.segments
        tokens = self.embed(images, patches, segments.pixels_of_token)
        first, order = prefix.to(tokens.dtype).expand(len(segments.lengths), -1, -1).flatten(0, 1), invert(place)
        x = take_rows(torch.cat([first, tokens]), order, place)
        every = torch.cat([patches.new_full((before.total,), -1), patches])[order]
        return self._encode(x, joined, every, Kept(place[before.total :], segments))

    def _encode(self, x: Tensor, segments: Segments, patches: Tensor, kept: Kept | None = None) -> Tensor:
        """patches: int64 (N,), of each token of x, −1 for prefix tokens."""
        rotation = None
        if self.architecture.positions == "rope":
            table = rotation_table(
                self.architecture.grid, self.width // self.heads, self.architecture.rope_base, x.device,
                torch.promote_types(x.dtype, torch.float32),
            )  # fmt: skip
            rotation = Rotation(table, patches)
        x = run_blocks(self.blocks, x, segments, kept=kept, rotation=rotation, recompute=self.activation_checkpointing)
        return self.norm(x)

    def _check(self, images: Tensor, patches: Tensor | None, segments: Segments | None) -> None:
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (self.image, self.image, 3):
            required = f"uint8 (B, {self.image}, {self.image}, 3)"
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; they must be {required}")
        if (patches is None) != (segments is None):
            raise ValueError("patches and segments come together: give both or neither")
        if patches is None or segments is None:
            return
        if patches.shape != (segments.total,) or segments.images != len(images):
            raise ValueError(
                f"segments are of {segments.images} images and {segments.total} tokens; there are "
                f"{len(images)} images and patches {tuple(patches.shape)}"
            )
