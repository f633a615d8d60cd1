"""Hostile and damaged checkpoints: nothing is built as they say, nothing wrong is read, time and memory are bounded."""

import io
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest
import torch

import fast
from fast.checkpoints import CheckpointError, from_official, load, to_official


def official():
    """A nano classifier's weights under the official names."""
    return to_official(fast.create_model("aff_nano", num_classes=4).state_dict())


def text(value):
    """A string as a pickle holds it."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def assert_refused(path, match):
    """Load a file that must be refused in one line with its name, and soon."""
    start = time.process_time()
    with pytest.raises(CheckpointError, match=match) as caught:
        load(path)
    assert time.process_time() - start < 5  # 2 where nothing else runs
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def zipped(path, pickled, **storages):
    """A file as torch.save writes it, of a pickle made by hand."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)


def dtype_with_state(code, *state):
    """Instructions that make a NumPy dtype and give it a state."""
    made = b"cnumpy\ndtype\n" + text(code) + b"\x89\x88\x87R"
    return made + pickle.dumps(state, 2)[2:-1].replace(b"q\x00", b"") + b"b"


def test_an_object_array_over_bytes_of_the_file_is_not_made(tmp_path):
    """dtype.__setstate__ with flags 0 on "O8", then numpy's scalar: 8 bytes would have been an address."""
    dtype = dtype_with_state("O8", 3, "|", None, None, None, -1, -1, 0)
    scalar = b"cnumpy._core.multiarray\nscalar\n" + dtype + b"C\x08" + b"A" * 8 + b"\x86R"
    program = b"\x80\x04}" + text("a") + scalar + b"s."
    for name in ("a.pkl", "a.pth"):
        (tmp_path / name).write_bytes(program)
        assert_refused(tmp_path / name, "gives 'O8' for a NumPy dtype")
    zipped(tmp_path / "b.pth", program)
    assert_refused(tmp_path / "b.pth", "gives 'O8' for a NumPy dtype")


@pytest.mark.parametrize(
    "state",
    [
        (3, "|", None, ("a",), {"a": 1}, 8, 1, 27),
        (3, "|", ("f8", (2,)), None, None, -1, -1, 0),
        (3, "<", None, None, None, 1 << 40, -1, 0),
        (3, "<", None, None, None, -1, -1, 63),
        (4, "<", None, None, None, -1, -1, 0, {}),
        (3, "x", None, None, None, -1, -1, 0),
        ([3], "<", None, None, None, -1, -1, 0),
    ],
)
def test_a_dtype_takes_no_state_but_a_byte_order(tmp_path, state):
    path = tmp_path / "a.pth"
    path.write_bytes(b"\x80\x02}" + text("a") + dtype_with_state("f8", *state) + b"s.")
    assert_refused(path, "for (the state of a dtype|a byte order)")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3, dtype=[("a", "f8"), ("b", "i4")]), np.array([object()], dtype=object), np.array(["text"]),
        np.array([b"x"]), np.zeros(2, dtype="c8"), np.zeros(2, dtype="M8[s]"), np.zeros(2, dtype="g"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_other_dtypes_are_refused(tmp_path, array, protocol):
    torch.save({"table": array}, tmp_path / "a.pth", pickle_protocol=min(protocol, 4))
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"table": array}, protocol))
    for name in ("a.pth", "a.pkl"):
        assert_refused(tmp_path / name, "corrupted|refused")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("code", ["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", ">f4", ">i2"])
def test_arrays_of_the_dtypes_read_come_back_as_tensors(tmp_path, code, protocol):
    array = np.arange(6).reshape(2, 3).astype(code)
    content = {"rows": array, "columns": np.asfortranarray(array), "part": array[:, ::2], "none": array[:0]}
    content |= {"number": array[1, 2], "axisless": np.array(array[1, 2])}
    for path in (tmp_path / "a.pkl", tmp_path / "a.pth"):
        if path.suffix == ".pkl":
            path.write_bytes(pickle.dumps(content, protocol))
        else:
            torch.save(content, path, pickle_protocol=min(protocol, 4))
        found = load(path)
        assert type(found["number"]) in (bool, int, float) and found["number"] == content["number"].item()
        for name in ("rows", "columns", "part", "none", "axisless"):
            assert found[name].numpy().dtype == array.dtype.newbyteorder("=") and type(found[name]) is torch.Tensor
            assert np.array_equal(found[name].numpy(), content[name]), name


def test_a_pickle_of_python_2_is_read(tmp_path):
    """Its strings are bytes, an ordered dict is made of pairs, and so are numpy's bytes."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x02t"
    array += b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    array += b"U\x08" + np.float32([1.5, -2]).tobytes() + b"tb"
    program = b"\x80\x02ccollections\nOrderedDict\n(](](U\x01w" + array + b"eetR."
    (tmp_path / "a.pkl").write_bytes(program)
    assert load(tmp_path / "a.pkl")["w"].tolist() == [1.5, -2]


@pytest.mark.parametrize("old", [False, True])
def test_what_torch_saves_comes_back(tmp_path, old):
    shared = torch.arange(12.0)
    dtypes = ("float16", "bfloat16", "float64", "int8", "int16", "uint8", "bool", "uint16")
    content = {
        "kinds": [torch.arange(4).to(getattr(torch, dtype)) for dtype in dtypes],
        "rows": shared[:6].view(2, 3), "columns": shared.view(3, 4).T, "every second": shared[1::2],
        "parameter": torch.nn.Parameter(torch.ones(2, 2)), "none": torch.zeros(0, 3), "axisless": torch.tensor(3.5),
        "plain": {0: (1, [2.5, None, True], {"x"}, b"bytes"), -1: "text", "large": 2**63}, "size": torch.Size([1, 2]),
        "dtype": torch.float32, "device": torch.device("cpu"),
    }  # fmt: skip
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    found = load(tmp_path / "a.pth")
    for one, other in zip(found.pop("kinds"), content.pop("kinds"), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert found.pop("device") == "cpu" and found.pop("size") == (1, 2)
    for name, value in found.items():
        same = torch.equal(value, content[name]) if isinstance(value, torch.Tensor) else value == content[name]
        assert same, name
    found["rows"][0, 1] = 50
    assert found["every second"][0] == 50 and found["columns"][1, 0] == 50, "tensors that shared memory share it"


def test_a_flipped_bit_of_a_weight_is_noticed(tmp_path):
    path, weight = tmp_path / "a.pth", torch.arange(4096.0)
    torch.save({"model": {"weight": weight}}, path)
    whole = path.read_bytes()
    start = whole.index(weight.numpy().tobytes())
    for place in range(start, start + 4 * 4096, 517):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert_refused(path, "truncated or corrupted .*CRC-32")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value, dtype, old):
    weight = torch.ones(3, 5, dtype=dtype)
    weight[1, 2] = value
    torch.save({"model": {"norm.weight": weight}}, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    assert_refused(tmp_path / "a.pth", "its model.norm.weight holds NaN or infinite numbers")
    weights = official() | {"norm.weight": torch.full((64,), value)}
    with pytest.raises(CheckpointError, match="does not fit: NaN or infinite: norm.weight$"):
        from_official(weights)


def test_arrays_and_safetensors_that_are_not_finite_are_refused(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": np.array([1, np.nan])}))
    assert_refused(tmp_path / "a.pkl", "its w holds NaN")
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"w": torch.tensor([1, float("inf")])}, tmp_path / "a.safetensors")
    assert_refused(tmp_path / "a.safetensors", "its w holds NaN or infinite")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_are_refused(tmp_path, dtype):
    for old in (False, True):
        torch.save({"w": torch.ones(3, dtype=dtype)}, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
        assert_refused(tmp_path / "a.pth", "numbers of torch.Complex(Float|Double)Storage; what is read is float16")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(64, dtype=torch.int64), "of another type: norm.weight is torch.int64"),
        (torch.ones(64, dtype=torch.bool), "of another type: norm.weight is torch.bool"),
        (torch.ones(64, dtype=torch.complex64), "of another type: norm.weight is torch.complex64"),
        (np.ones(64, dtype="O"), "of another type: norm.weight is object"),
        (torch.tensor(1.0), r"misshapen: norm.weight is \(\), not \(64,\)"),
        (3, r"misshapen: norm.weight is \(\), not \(64,\); of another type: norm.weight is int"),
        (None, "of another type: norm.weight is NoneType"),
        ({}, "of another type: norm.weight is dict"),
    ],
)
def test_weights_of_another_type_are_named(value, message):
    with pytest.raises(CheckpointError, match=message):
        from_official(official() | {"norm.weight": value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("head.weight", torch.tensor(1.0), "no key is like head"),
        ("layers.0.blocks.0.norm1.weight", torch.tensor(1.0), "not the weights|misshapen"),
        ("layers.0.blocks.0.norm1.weight", torch.ones(0), "positive whole numbers"),
        ("layers.0.blocks.0.mlp.fc1.weight", torch.tensor(1.0), "no key is like"),
        ("layers.2.blocks.0.attn.pos_embed.weight", torch.ones(0, 5), "positive whole numbers"),
        ("layers.2.blocks.0.attn.pos_embed.weight", torch.ones(5, 5), "multiples of heads"),
        ("layers.0.blocks.1000000.norm1.weight", torch.ones(16), "blocks.1000000: such parts are numbered from 0"),
        ("layers.0.blocks.65.norm1.weight", torch.ones(16), "numbered from 0 to at most 63"),
        ("layers.0.blocks.x.norm1.weight", torch.ones(16), "numbered from 0"),
        ("layers.0.blocks.\u0661.norm1.weight", torch.ones(16), "numbered from 0"),
        ("layers.0.blocks.2.norm1.weight", torch.ones(16), "missing: .*blocks.1.norm1.weight"),
        ("head.weight", torch.empty(2**40, 64, device="meta"), "no axis of a weight has more than 1,048,576"),
        (7, torch.ones(1), "names of weights must be strings; there is 7, a int"),
        (None, torch.ones(1), "names of weights must be strings; there is None, a NoneType"),
        (b"x", torch.ones(1), "a bytes"),
        ("backbone.x", torch.ones(1), "no key is like|misshapen"),
    ],
)
def test_odd_names_and_shapes_are_one_line(name, value, message):
    start = time.process_time()
    with pytest.raises(CheckpointError, match=message) as caught:
        from_official(official() | {name: value})
    assert "\n" not in str(caught.value) and time.process_time() - start < 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decoder.query_features.weight", torch.tensor(1.0)),
        ("decoder.class_head.weight", torch.tensor(1.0)),
        ("pixel_decoder.encoder.0.fc1.weight", torch.tensor(1.0)),
        ("pixel_decoder.encoder.x.fc1.weight", torch.ones(3)),
        ("pixel_decoder.encoder.1000000.fc1.weight", torch.ones(3)),
        ("decoder.layers.99999999.fc1.weight", torch.ones(3)),
        ("decoder.class_head.weight", torch.ones(1, 16)),
        ("decoder.query_features.weight", torch.ones(0, 16)),
        ("pixel_decoder.encoder.0.attention.attention_weights.weight", torch.ones(3, 16)),
    ],
)
def test_odd_heads_are_one_line(name, value):
    small = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 24), "heads": (1, 1, 2, 2)}
    weights = fast.create_segmenter("aff_nano", backbone_overrides=small, hidden_dim=16, heads=2).state_dict()
    with pytest.raises(CheckpointError):
        to_official(weights | {name: value})


def test_many_wrong_names_are_counted_not_listed():
    with pytest.raises(CheckpointError, match=r"x99 and 49,900 more$") as caught:
        from_official(official() | {f"x{i}": 0 for i in range(50_000)})
    assert len(str(caught.value)) < 2000


def test_names_that_wrappers_put_before_are_taken_off(tmp_path):
    plain = official()
    for start in ("module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."):
        for content in (
            put := {start + name: value for name, value in plain.items()},
            {"state_dict": put},
            {"model": put},
        ):
            torch.save(content, tmp_path / "a.pth")
            found = from_official(load(tmp_path / "a.pth"))
            assert all(torch.equal(found[name], value) for name, value in from_official(plain).items()), start
    with pytest.raises(CheckpointError, match=r"missing: module.norm.bias$|misshapen: module.norm.bias"):
        from_official({"module." + n: torch.ones(3) if n == "norm.bias" else v for n, v in plain.items()})
    with pytest.raises(CheckpointError, match="a dict of names to tensors, not a list"):
        from_official([])


def laughs(make, depth):
    value = make([])
    for _ in range(depth):
        value = make([value] * 10)
    return value


@pytest.mark.parametrize("make", [list, tuple, lambda items: {str(i): each for i, each in enumerate(items)}])
def test_containers_named_again_and_again_do_not_multiply(tmp_path, make):
    torch.save({"a": laughs(make, 30)}, tmp_path / "a.pth")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": laughs(make, 30)}))
    for name in ("a.pth", "a.pkl"):
        assert_refused(tmp_path / name, "holds more than 500,000 values, or containers nested more than 64 deep")


def test_deep_nesting_and_containers_that_hold_themselves_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    for program in (
        b"\x80\x02}" + text("a") + b"]" * 200_000 + b"a" * 199_999 + b"s.",
        b"\x80\x02}" + text("a") + b")" + b"\x85" * 200_000 + b"s.",
        b"\x80\x02}q\x00" + text("a") + b"h\x00s.",
    ):
        path.write_bytes(program)
        assert_refused(path, "nested more than 64 deep")


def test_long_programs_copies_and_large_numbers_are_refused(tmp_path):
    path, long = tmp_path / "a.pth", text("x" * 10_000_000)
    for program, reason in [
        (b"]" + b"N0" * 300_000, "more than 500,000 instructions"),
        (b"\x8b\xff\xff\xff\x7f", "a whole number"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "breaks off"),
        (b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f", "breaks off"),
        (b"X\xff\xff\xff\xff", "breaks off"),
        (
            b"]" + long + b"q\x000" + (b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86Ra") * 100,
            "copies the same bytes",
        ),
        (b"}I1\nNs", "the pickle instruction b'I', which is not read"),
    ]:
        path.write_bytes(b"\x80\x04" + program + b".")
        assert_refused(path, reason)


@pytest.mark.parametrize("key", [b"x", None, 1.5, 2**40, (1, 2), torch.float32])
def test_keys_are_strings_and_whole_numbers(tmp_path, key):
    torch.save({"a": {key: 1}}, tmp_path / "a.pth")
    assert_refused(tmp_path / "a.pth", "for a key")


def torch_pickle(size, stride, length, offset=0, kind="Float"):
    """A pickle of torch.save with one tensor."""
    storage = text("storage") + f"ctorch\n{kind}Storage\n".encode() + text("0") + text("cpu")
    numbers = [pickle.dumps(value, 2)[2:-1].replace(b"q\x00", b"") for value in (length, offset, size, stride)]
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage + numbers[0] + b"tQ" + b"".join(numbers[1:])
    return b"\x80\x02}" + text("w") + tensor + b"\x89ccollections\nOrderedDict\n)RtRs."


@pytest.mark.parametrize(
    ("size", "stride", "length", "offset"),
    [
        ((4,), (1,), 4, 1), ((4,), (2,), 4, 0), ((4,), (-1,), 4, 3), ((1 << 40,), (0,), 4, 0), ((4,), (1,), 1 << 40, 0),
        ((4,), (1,), 3, 0), ((0, 1 << 40), (1, 1), 4, 0), ((1 << 20, 1 << 20), (0, 0), 4, 0), ((4,), (1, 1), 4, 0),
        ((4,), (1,), 4, -1), ((1,) * 40, (1,) * 40, 4, 0), ((4.0,), (1,), 4, 0), ((2, 2), (1 << 62, 1 << 62), 4, 0),
    ],
)  # fmt: skip
def test_tensors_that_reach_beyond_their_numbers_are_refused(tmp_path, size, stride, length, offset):
    path = tmp_path / "a.pth"
    zipped(path, torch_pickle((4,), (1,), 4), **{"0": np.arange(4.0).astype("f4").tobytes()})
    assert load(path)["w"].tolist() == [0, 1, 2, 3]
    zipped(path, torch_pickle(size, stride, length, offset), **{"0": np.arange(4.0).astype("f4").tobytes()})
    assert_refused(path, "truncated or corrupted")


def test_zip_files_of_another_form_are_refused(tmp_path):
    path, data = tmp_path / "a.pth", torch_pickle((4,), (1,), 4)
    zipped(path, data)
    assert_refused(path, "its part data/0 is missing")
    zipped(path, data, **{"0": bytes(15)})
    assert_refused(path, "its part data/0 has 15 bytes, not 16")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", bytes(200_000_000))
    assert_refused(path, "its parts are packed")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "text")
    assert_refused(path, "a zip file, but not of torch.save")
    zipped(path, data, **{"0": bytes(16)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", data)
    assert_refused(path, "a zip file, but not of torch.save")


def test_an_old_file_says_where_its_numbers_are(tmp_path):
    path, buffer = tmp_path / "a.pth", io.BytesIO()
    torch.save({"a": torch.arange(3.0), "b": torch.arange(5)}, buffer, _use_new_zipfile_serialization=False)
    whole = buffer.getvalue()
    path.write_bytes(whole)
    assert load(path)["b"].tolist() == [0, 1, 2, 3, 4]
    for cut in (1, 8, 40, 48, 60):
        path.write_bytes(whole[:-cut])
        assert_refused(path, "truncated or corrupted")
    longer = whole.replace((3).to_bytes(8, "little") + np.float32([0]).tobytes(), bytes([4] + [0] * 11))
    assert longer != whole
    path.write_bytes(longer)
    assert_refused(path, "its numbers are not where they belong")
