"""Folders are read straight to their devices, in little memory, and no bad file gets through."""

import json
import random
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors.numpy import load_file, save_file

from benchmarks.load import measure, room, write_random
from lora_mini_jax import models
from lora_mini_jax.data.tokenizer_folder import OTHER_FILES
from lora_mini_jax.errors import UserError
from lora_mini_jax.models import Llama, LlamaConfig, load, save
from lora_mini_jax.models import tensors as format_of
from lora_mini_jax.models.families import family_of_module
from lora_mini_jax.models.hub import COMPANIONS, load_module
from lora_mini_jax.models.tensors import DTYPES, tensors_of

CONFIG = LlamaConfig(
    vocab_size=19, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, params) of a tiny model."""
    model, rng = Llama(CONFIG), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    folder = tmp_path_factory.mktemp("saved") / "model"
    save(folder, model, params)
    return folder, params


@pytest.fixture
def folder(tmp_path, saved):
    """A copy to be spoilt."""
    return shutil.copytree(saved[0], tmp_path / "model")


def equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("slab", [1, 100, 1 << 22])
@pytest.mark.parametrize("scan", [False, True])
def test_pieces_of_any_size_make_the_same_tensors(saved, monkeypatch, slab, scan):
    folder, params = saved
    monkeypatch.setattr(format_of, "_SLAB", slab)
    got = load(folder, scan_layers=scan)[1]
    if scan:
        for i in range(2):
            equal(jax.tree.map(lambda x, i=i: x[i], got["layers"]), params[f"layers_{i}"])
    else:
        equal(got, params)


def test_the_hub_is_asked_once_for_a_model(saved, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(saved[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for revision in (None, None, "v2"):
        equal(load("somebody/llama-of-tests", revision=revision)[1], saved[1])
    assert asked == [("somebody/llama-of-tests", None), ("somebody/llama-of-tests", "v2")]


ENCODER: dict[str, Any] = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 24,
                           "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
ONCE = {
    "llama": (Llama(replace(CONFIG, tie_word_embeddings=True)),
              {"model.embed_tokens.weight": "lm_head.weight"}),
    "gpt2": (models.GPT2(models.GPT2Config(vocab_size=19, n_embd=16, n_layer=1, n_head=2)),
             {"transformer.wte.weight": "lm_head.weight"}),
    "t5": (models.T5(models.T5Config(19, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2)),
           {"shared.weight": "decoder.embed_tokens.weight"}),
    "roberta": (models.Roberta(models.RobertaConfig(**ENCODER, task="masked-lm")),
                {"roberta.embeddings.word_embeddings.weight": "lm_head.decoder.weight",
                 "lm_head.bias": "lm_head.decoder.bias"}),
}  # fmt: skip
"""Models with tied tensors, and the other name of each."""


@pytest.mark.parametrize("name", ONCE)
def test_a_tied_tensor_is_read_under_either_name(name, tmp_path):
    model, others = ONCE[name]
    inputs = [jnp.ones((1, 2), jnp.int32)] * (2 if name == "t5" else 1)
    params = model.init(jax.random.key(0), *inputs)["params"]
    save(tmp_path / "m", model, params)
    file = tmp_path / "m/model.safetensors"
    moved = {others.get(key, key): tensor for key, tensor in load_file(file).items()}
    save_file(moved, file)
    equal(load(tmp_path / "m")[1], params)
    twice = moved | {key: moved[other] + 1 for key, other in others.items()}
    save_file(twice, file)
    with pytest.raises(UserError, match="tied, yet not equal"):
        load(tmp_path / "m")


def test_every_parameter_goes_where_it_is_told(saved):
    folder, params = saved
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("a", "b"))
    seen = []

    def place(path):
        seen.append(path)
        if path.endswith("kernel"):
            return NamedSharding(mesh, PartitionSpec("a", "b"))
        return None if "norm" in path else SingleDeviceSharding(jax.devices()[0])

    got = load(folder, sharding=place)[1]
    equal(got, params)
    assert got["layers_0"]["mlp"]["up_proj"]["kernel"].sharding == place("a/kernel")
    assert got["embed_tokens"]["embedding"].sharding == place("embedding")
    assert "layers_1/self_attn/o_proj/kernel" in seen
    whole = NamedSharding(mesh, PartitionSpec())
    got = load(folder, sharding=whole, param_dtype=jnp.bfloat16)[1]
    assert {leaf.sharding for leaf in jax.tree.leaves(got)} == {whole}
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}


EIGHT = """
import jax, numpy as np, sys
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from lora_mini_jax.errors import UserError
from lora_mini_jax.models import load
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
def place(path):
    if path.startswith("lm_head"):
        return None
    axes = {"kernel": ("a", "b"), "scale": ("b",)}.get(path.split("/")[-1], (None, "a"))
    return NamedSharding(mesh, P(*(None,) * path.startswith("layers/"), *axes))
for scan in (False, True):
    plain, spread = load(sys.argv[1], scan_layers=scan)[1], load(
        sys.argv[1], scan_layers=scan, sharding=place)[1]
    jax.tree.map(np.testing.assert_array_equal, plain, spread)
    layer = spread["layers" if scan else "layers_0"]
    assert layer["mlp"]["up_proj"]["kernel"].addressable_shards[0].data.shape[-2:] == (8, 6)
try:
    load(sys.argv[1], sharding=NamedSharding(mesh, P("b")))
except UserError as error:
    print(error)
"""


def test_eight_devices_get_their_parts(saved):
    from benchmarks.load import child

    said = child(["-c", EIGHT, str(saved[0])], devices=8)
    assert "embed_tokens/embedding (19, 16) cannot be sharded" in said


def spoil(folder, header=None, length=None, tail=b"", cut=None):
    """Rewrite the weights' file with another header, declared length or end."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    own = data[8 : 8 + size]
    if header is not None:
        own = header(json.loads(own)) if callable(header) else header
        own = own if isinstance(own, bytes) else json.dumps(own).encode()
    declared = struct.pack("<Q", len(own) if length is None else length)
    file.write_bytes((declared + own + data[8 + size :] + tail)[:cut])


def entry(**changes):
    """A header in which the final norm is described otherwise."""
    return lambda header: header | {"model.norm.weight": header["model.norm.weight"] | changes}


def config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


SPOILT: dict[str, tuple[Any, list[str]]] = {
    "short": (lambda f: spoil(f, cut=5), ["declares a header", "5 in all"]),
    "cut header": (lambda f: spoil(f, cut=200), ["declares a header", "200 in all"]),
    "huge header": (lambda f: spoil(f, length=2**63), [f"header of {2**63} bytes"]),
    "past the end": (lambda f: spoil(f, length=10**6), ["header of 1000000 bytes"]),
    "no JSON": (lambda f: spoil(f, b"{" * 8), ["damaged"]),
    "no UTF-8": (lambda f: spoil(f, b"\xff\xfe\xfd\xfc"), ["damaged"]),
    "deep": (lambda f: spoil(f, b"[" * 200_000), ["nested too deeply"]),
    "no object": (lambda f: spoil(f, b"[1, 2]"), ["no object"]),
    "long number": (lambda f: spoil(f, b'{"a": ' + b"9" * 5000 + b"}"), ["damaged"]),
    "no entry": (lambda f: spoil(f, lambda h: h | {"model.norm.weight": 3}), ["no dtype"]),
    "no shape": (lambda f: spoil(f, entry(shape="16")), ["no shape"]),
    "negative": (lambda f: spoil(f, entry(shape=[-16])), ["no shape of whole numbers"]),
    "wrong size": (lambda f: spoil(f, entry(shape=[17])), ["model.norm.weight", "bytes"]),
    "outside": (lambda f: spoil(f, entry(data_offsets=[10**9, 10**9 + 64])), ["end to end"]),
    "overlap": (lambda f: spoil(f, entry(data_offsets=[0, 64])), ["end to end"]),
    "more": (lambda f: spoil(f, tail=b"more"), ["end to end"]),
    "a line in a name": (lambda f: spoil(f, lambda h: h | {"a\nb": h["model.norm.weight"]}),
                         ["'a\\nb'"]),
    "a kind": (lambda f: spoil(f, entry(dtype="F8_E4M3")), ["F8_E4M3", "not one of F64"]),
    "turned": (lambda f: spoil(f, entry(shape=[1, 16])), ["(1, 16), not (16,)"]),
    "layers": (lambda f: config(f, num_hidden_layers=9999), ["9999 layers", "21 tensors"]),
    "too many layers": (lambda f: config(f, num_hidden_layers=10**9), ["1 to 10000"]),
    "large": (lambda f: config(f, vocab_size=10**30), ["vocab_size"]),
    "a key": (lambda f: config(f, hidden_size=None), ["missing hidden_size"]),
    "deep JSON": (lambda f: (f / "config.json").write_text("[" * 200_000), ["config.json"]),
    "long JSON": (lambda f: (f / "config.json").write_text('{"a": ' + "9" * 5000 + "}"),
                  ["config.json"]),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT, ids=lambda name: name.replace(" ", "-"))
def test_a_spoilt_file_is_one_clear_line(folder, case):
    change, words = SPOILT[case]
    change(folder)
    with pytest.raises(UserError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def index(folder, **names):
    """Put the weights in shards of these names, as an index says."""
    file = folder / "model.safetensors"
    now = load_file(file)
    file.unlink()
    for shard, part in names.items():
        save_file({k: now[k] for k in part}, folder / f"{shard}.safetensors")
    where = {name: f"{shard}.safetensors" for shard, part in names.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return where


def test_a_tensor_in_two_shards_is_refused(folder):
    every = list(load_file(folder / "model.safetensors"))
    index(folder, a=every, b=every[:1])
    file = folder / "model.safetensors.index.json"
    where = json.loads(file.read_text())["weight_map"]
    file.write_text(json.dumps({"weight_map": where | {every[1]: "a.safetensors"}}))
    with pytest.raises(UserError, match=f"both hold {every[0]}"):
        load(folder)


@pytest.mark.parametrize("name", ["../a.safetensors", "a\nb", "a\0b", "x" * 400, "\ud800", ".."])
def test_an_index_of_odd_names_is_refused(folder, name):
    index(folder, a=list(load_file(folder / "model.safetensors")))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": name}}))
    with pytest.raises(UserError, match=r"outside the folder|lacks the shards") as error:
        load(folder)
    assert str(error.value).isprintable()


def test_whatever_a_tokenizer_is_made_of_is_fetched_and_kept_with_the_model():
    assert set(OTHER_FILES) <= set(COMPANIONS)


def test_a_file_that_shrinks_while_it_is_read(folder):
    tensor = tensors_of(folder / "model.safetensors")["model.norm.weight"]
    spoil(folder, cut=-100)
    with pytest.raises(UserError, match=r"ends within model\.norm\.weight"):
        tensor.read(np.empty(16, np.float32), (slice(None),))


VALUES = ("0", "-1", "1", "3", "1e400", "NaN", "null", "true", '""', "[]", "{}", '"F16"',
          "99999999999999999999", "[[]]", '"\\u0000"', '"full_attention"', '[null]')  # fmt: skip


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The bytes with one to three small changes; some are to values of JSON."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, much = rng.randrange(len(data)), rng.randrange(1, 9)
        kind = rng.randrange(6)
        if kind == 0:
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[at + much :] or b"{"
        elif kind == 2:
            data = data[:at] + data[at : at + much] * 2 + data[at + much :]
        elif kind == 3:
            data = data[:at] + rng.randbytes(much) + data[at:]
        else:  # the value after the next colon
            colon = data.find(b":", at) + 1
            ends = [end for end in (data.find(c, colon) for c in (b",", b"}")) if end > 0]
            value = rng.choice(VALUES).encode()
            data = data[:colon] + value + data[min(ends, default=len(data)) :]
    return data


def outcome(folder) -> str:
    """What became of a load: "read", or the first words of a `UserError`."""
    try:
        load(folder)
    except UserError as error:
        return "refused" if str(error).isprintable() else repr(error)
    return "read"


def test_no_mutation_of_a_header_gets_through(folder):
    file, rng = folder / "model.safetensors", random.Random(0)
    whole = file.read_bytes()
    size = 8 + struct.unpack("<Q", whole[:8])[0]
    seen = set()
    for _ in range(1500):
        head = mutated(rng, whole[8:size])
        length = struct.pack("<Q", len(head))
        if rng.random() < 0.2:
            length = mutated(rng, length)[:8]
        file.write_bytes(length + head + whole[size:])
        seen.add(outcome(folder))
    assert seen <= {"read", "refused"}
    assert "refused" in seen


def test_no_mutation_of_a_config_gets_through(folder):
    file, rng = folder / "config.json", random.Random(1)
    whole = file.read_bytes()
    seen = set()
    for _ in range(800):
        file.write_bytes(mutated(rng, whole))
        seen.add(outcome(folder))
    assert seen == {"read", "refused"}  # some changes make no difference


BERT = {"model_type": "bert", "vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 8, "hidden_act": "gelu",
        "max_position_embeddings": 16, "type_vocab_size": 2}  # fmt: skip
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 19,
        "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16,
        "activation_function": "gelu_new"}  # fmt: skip
CONFIGS = {"bert": json.dumps(BERT), "gpt2": json.dumps(GPT2)} | {
    folder.name: (folder / "config.json").read_text()
    for folder in (Path(__file__).parents[1] / "experiments/configs").iterdir()
}


@pytest.mark.parametrize("name", ["bert", "gpt2", "roberta-base", "deberta-v3-base", "t5-base",
                                  "gemma-2-9b"])  # fmt: skip
def test_no_mutation_of_another_config_gets_through(name, tmp_path):
    file, rng, seen = tmp_path / "config.json", random.Random(2), set()
    for _ in range(400):
        file.write_bytes(mutated(rng, CONFIGS[name].encode()))
        try:
            load_module(tmp_path)
            seen.add("read")
        except UserError as error:
            seen.add("refused" if str(error).isprintable() else repr(error))
    assert seen == {"read", "refused"}


@pytest.mark.parametrize("name", [name for name in CONFIGS if "70b" not in name])
def test_shapes_of_layers_one_by_one_are_those_of_stacked_ones(name, tmp_path):
    (tmp_path / "config.json").write_text(CONFIGS[name])
    model: Any = load_module(tmp_path)
    layers = next(n for n in ("num_layers", "num_hidden_layers", "n_layer")
                  if n in model.config.__dataclass_fields__)  # fmt: skip
    model = model.clone(config=replace(model.config, **{layers: 2}))
    family = family_of_module(model)
    traced = jax.eval_shape(model.init, jax.random.key(0), *family.inputs())["params"]
    assert family.shapes(model) == traced


@pytest.mark.slow
def test_a_large_model_is_held_once(tmp_path):
    if reason := room(tmp_path, gigabytes=8):
        pytest.skip(reason)
    write_random(tmp_path / "large")
    try:
        for how, most in (("load", 1.15), ("load stacked", 1.3)):
            row = measure(tmp_path / "large", how)
            assert row["result_bytes"] > 3e9
            assert row["peak_growth"] < most * row["file_bytes"], row
    finally:
        shutil.rmtree(tmp_path / "large")


def test_kinds_of_numbers_are_those_of_numpy():
    assert {kind: dtype.itemsize for kind, dtype in DTYPES.items()} == {
        "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    }  # fmt: skip
