"""The message `tf.train.Example`, described to the protobuf package without TensorFlow.

Field numbers and names are TensorFlow's public format (tensorflow/core/example/{example,feature}.proto).
"""

from __future__ import annotations

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

__all__ = ["ENCODED", "LABEL", "encoded_image", "label_of", "message_class"]

ENCODED, LABEL = "image/encoded", "image/class/label"

_PACKAGE = "iwm_fast.tensorflow"
_BYTES, _FLOAT, _INT64, _MESSAGE = 12, 2, 3, 11
_OPTIONAL, _REPEATED = 1, 3


@functools.cache
def message_class() -> Any:
    """Return protobuf's class of an Example."""
    file = descriptor_pb2.FileDescriptorProto(name="iwm_fast/example.proto", package=_PACKAGE, syntax="proto3")
    for name, kind in (("BytesList", _BYTES), ("FloatList", _FLOAT), ("Int64List", _INT64)):
        file.message_type.add(name=name).field.add(name="value", number=1, type=kind, label=_REPEATED)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("BytesList", "FloatList", "Int64List"), start=1):
        field = f"{name.removesuffix('List').lower()}_list"
        feature.field.add(
            name=field, number=number, type=_MESSAGE, label=_OPTIONAL, type_name=f".{_PACKAGE}.{name}", oneof_index=0
        )
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=9, label=_OPTIONAL)
    entry.field.add(name="value", number=2, type=_MESSAGE, label=_OPTIONAL, type_name=f".{_PACKAGE}.Feature")
    features.field.add(
        name="feature", number=1, type=_MESSAGE, label=_REPEATED, type_name=f".{_PACKAGE}.Features.FeatureEntry"
    )
    example = file.message_type.add(name="Example")
    example.field.add(name="features", number=1, type=_MESSAGE, label=_OPTIONAL, type_name=f".{_PACKAGE}.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Example"))


def _feature(payload: bytes, name: str) -> Any:
    """Return a feature of an Example, or None. Raise ValueError if the bytes are not an Example."""
    try:
        features = message_class().FromString(payload).features.feature
    except DecodeError as error:
        raise ValueError("the record is not a tf.train.Example") from error
    return features.get(name)


def encoded_image(payload: bytes) -> bytes:
    """Return the bytes of `image/encoded`. Raise ValueError if the record has none, or several."""
    feature = _feature(payload, ENCODED)
    if feature is None or not feature.bytes_list.value:
        raise ValueError(f"the record has no {ENCODED}")
    if len(feature.bytes_list.value) > 1:
        raise ValueError(f"the record has {len(feature.bytes_list.value)} images in {ENCODED}; write one per record")
    return bytes(feature.bytes_list.value[0])


def label_of(payload: bytes) -> str:
    """Return `image/class/label` as text, "" for none or several. Raise ValueError if it is no Example.

    A whole number is written as an integer, whether it is stored as an integer or a float.
    """
    feature = _feature(payload, LABEL)
    if feature is None:
        return ""
    values = [
        *feature.int64_list.value,
        *(str(int(value)) if float(value).is_integer() else str(value) for value in feature.float_list.value),
        *(value.decode(errors="replace") for value in feature.bytes_list.value),
    ]
    return str(values[0]).strip() if len(values) == 1 else ""
