import json
import math
import random
import zlib

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import nn

from pruneflow.deploy.__main__ import main
from pruneflow.deploy.packed import inspect_packed, load_packed, save_packed
from pruneflow.state_dicts import load_safetensors

DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64),
    *(torch.bool, torch.complex64, torch.complex128),
)


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def same(found, expected):
    return (
        list(found) == list(expected)
        and all(found[name].dtype == expected[name].dtype for name in expected)
        and all(found[name].shape == expected[name].shape for name in expected)
        and all(bits(found[name]) == bits(expected[name]) for name in expected)
    )


def sparse(*shape, density=0.1, dtype=torch.float32):
    """Random survivors, among them -0.0, NaN and whatever else its bits may spell."""
    tensor = torch.zeros(shape, dtype=dtype)
    data = tensor.view(-1).view(torch.uint8).view(-1, tensor.itemsize)
    kept = torch.rand(len(data)) < density
    data[kept] = torch.randint(256, (int(kept.sum()), tensor.itemsize), dtype=torch.uint8)
    if dtype == torch.bool:
        data.clamp_(max=1)
    return tensor


def network():
    """A little of everything: pruned and dense weights, normalisation and its counter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4))
    model[0].weight.data[torch.rand(8, 3, 3, 3) < 0.7] = 0
    model[3].weight.data[torch.rand(4, 288) < 0.98] = 0
    return model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.packed"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(max_size=3),
            st.sampled_from(DTYPES),
            st.lists(st.integers(0, 9), max_size=4),
            st.sampled_from([0.0, 0.004, 0.1, 0.5, 0.95, 1.0]),
        ),
        max_size=4,
        unique_by=lambda one: one[0],
    ),
    st.integers(0, 2**32),
)
def test_every_bit_comes_back(tmp_path_factory, tensors, seed):
    torch.manual_seed(seed)
    state = {name: sparse(*shape, density=p, dtype=dtype) for name, dtype, shape, p in tensors}
    path = tmp_path_factory.getbasetemp() / "every_bit.packed"
    assert save_packed(state, path) == path.stat().st_size
    assert same(load_packed(path), state)
    for tensor in inspect_packed(path):
        assert tensor.shape == state[tensor.name].shape
        assert tensor.dtype == tensor.values == state[tensor.name].dtype
        words = state[tensor.name].contiguous().reshape(-1).view(torch.uint8)
        words = words.view(-1, min(8, tensor.dtype.itemsize))
        assert tensor.nonzeros == int(words.any(1).sum())
        assert tensor.entries == len(words)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_gaps_and_dense_stretches(path, dtype):
    state = {"weight": torch.zeros(3000), "last": torch.zeros(70000)}
    state["weight"][[0, 1, 255, 511, 766, 767, 1022, 2999]] = 1
    state["last"][-1] = 1
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    save_packed(state, path)
    assert same(load_packed(path), state)
    for density in (0.0005, 0.02, 0.4, 0.9):
        state = {"weight": sparse(150, 100, density=density, dtype=dtype)}
        save_packed(state, path)
        assert same(load_packed(path), state)


def test_only_zeros_without_a_sign_are_left_out(path):
    weight = torch.zeros(6)
    weight.view(torch.int32)[:4] = torch.tensor([-(2**31), 0x7FC12345, 1, 0x7F800001])
    save_packed({"weight": weight}, path)
    assert same(load_packed(path), {"weight": weight})
    assert inspect_packed(path)[0].nonzeros == 4


def test_a_model_comes_back_in_its_order_and_loads_strict(path):
    model = network()
    save_packed(model.state_dict(), path)
    state = load_packed(path)
    assert same(state, model.state_dict())
    fresh = network()
    nn.init.zeros_(fresh[0].weight)
    fresh.load_state_dict(state, strict=True)
    assert same(fresh.state_dict(), model.state_dict())
    state["0.weight"].add_(1)  # ordinary tensors, that can be written to


def test_strides_do_not_matter(path):
    weight = sparse(8, 6, 4, 4)
    state = {
        "channels_last": weight.to(memory_format=torch.channels_last),
        "transposed": weight.transpose(0, 1),
        "every_second": weight[::2],
        "expanded": torch.ones(1).expand(5),
        "conjugate": torch.tensor([1 + 2j, 0j]).conj(),
        "requires_grad": nn.Parameter(weight),
    }
    save_packed(state, path)
    found = load_packed(path)
    expected = {name: tensor.resolve_conj() for name, tensor in state.items()}
    assert same(found, expected)
    assert all(tensor.is_contiguous() for tensor in found.values())


def test_tied_tensors_are_written_once_and_come_back_as_one(path):
    weight, other = sparse(45, 45, density=0.5), sparse(45, 45, density=0.5)
    apart = save_packed({"embedding": weight, "head": other}, path)
    state = {"embedding": weight, "view": weight.t(), "head": weight, "empty": torch.empty(0)}
    state |= {"also_empty": torch.empty(0)}
    assert save_packed({"embedding": weight, "head": weight}, path) < 0.6 * apart
    save_packed(state, path)
    found = load_packed(path)
    assert same(found, state)
    assert found["head"] is found["embedding"]
    assert found["empty"] is not found["also_empty"]
    assert same(load_packed(path, names=["head"]), {"head": weight})
    assert [tensor.same_as for tensor in inspect_packed(path)] == [
        *(None, None, "embedding", None, None)
    ]
    assert inspect_packed(path)[2].bytes == 0


def test_equal_tensors_that_are_not_tied_stay_apart(path):
    save_packed({"one": torch.ones(5), "two": torch.ones(5)}, path)
    found = load_packed(path)
    found["one"].zero_()
    assert found["two"].tolist() == [1] * 5


def test_the_layout_is_as_its_description_says(path):
    """A second reader, written from the description alone, one entry after the other."""
    torch.manual_seed(0)
    state = network().state_dict() | {"dense": torch.randn(600), "rare": torch.zeros(2, 900)}
    state["rare"][1, -3:] = torch.tensor([1.5, 0.0, -2.0])
    save_packed(state, path, values="float16")
    contents = load_file(path)
    assert set(contents) == {"index", "data"}
    index = json.loads(zstandard.decompress(contents["index"].tobytes()))
    assert [entry["name"] for entry in index] == list(state)
    assert {entry["positions"] for entry in index} == {"all", "gaps", "mask"}
    assert {entry["values"] for entry in index} == {"float32", "float16", "int64"}
    for entry in index:
        streams, start = [], entry["start"]
        for size, stored in entry["streams"]:
            stream = contents["data"][start : start + stored].tobytes()
            streams.append(stream if stored == size else zstandard.decompress(stream))
            assert len(streams[-1]) == size
            start += stored
        assert zlib.crc32(contents["data"][entry["start"] : start].tobytes()) == entry["crc32"]
        count = math.prod(entry["shape"])
        positions = list(range(count))
        if entry["positions"] == "gaps":
            positions, position = [], 0
            for byte in streams.pop(0):
                position += byte
                if byte < 255:
                    positions.append(position)
                    position += 1
        elif entry["positions"] == "mask":
            mask = streams.pop(0)
            positions = [i for i in range(count) if mask[i // 8] >> i % 8 & 1]
        width = 8 * len(streams)
        values = []
        for i in range(entry["kept"]):
            turned = sum(stream[i] << 8 * byte for byte, stream in enumerate(streams))
            values.append(turned >> 1 | (turned & 1) << width - 1)
        written = np.array(values, f"<u{width // 8}").view(entry["values"])
        array = np.zeros(count, entry["dtype"])
        array[positions] = written
        found = torch.from_numpy(array.reshape(entry["shape"]))
        expected = state[entry["name"]]
        assert torch.equal(found, expected.half().float() if width == 16 else expected)


class Versioned(nn.Linear):
    """As torchvision's MNASNet: it loads no weights of a version that is not its own."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        if local_metadata.get("version") != 2:
            raise ValueError("version should be 2")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


def test_the_versions_of_modules_come_along(path):
    model = nn.Sequential(nn.BatchNorm1d(3), Versioned(3, 2))
    state = model.state_dict()
    save_packed(state, path)
    assert load_packed(path)._metadata == state._metadata
    assert load_packed(path, names=["1.bias"])._metadata == state._metadata
    nn.Sequential(nn.BatchNorm1d(3), Versioned(3, 2)).load_state_dict(load_packed(path))
    about = json.loads(safe_open(path, "numpy").metadata()["pruneflow.packed"])
    frame = load_file(path)["modules"].tobytes()
    assert zlib.crc32(frame) == about["modules_crc32"]
    assert json.loads(zstandard.decompress(frame)) == state._metadata


def test_what_says_nothing_of_its_modules_is_packed_as_before(path):
    save_packed({"weight": torch.ones(2)}, path)
    assert set(load_file(path)) == {"index", "data"}
    assert not hasattr(load_packed(path), "_metadata")


def test_modules_that_are_none_are_refused(path):
    save_packed(nn.Linear(2, 1).state_dict(), path)
    contents = load_file(path)
    about = json.loads(safe_open(path, "numpy").metadata()["pruneflow.packed"])
    for text in ("[]", '{"": 1}', "{", "null"):
        frame = zstandard.compress(text.encode())
        known = about | {"modules_bytes": len(text), "modules_crc32": zlib.crc32(frame)}
        modules = {"modules": np.frombuffer(frame, np.uint8)}
        save_file(contents | modules, path, {"pruneflow.packed": json.dumps(known)})
        with pytest.raises(ValueError, match="damaged"):
            load_packed(path)


def test_takes_no_more_than_the_entropy_of_positions_and_whole_values(path):
    torch.manual_seed(0)
    for density in (0.001, 0.02, 0.15, 0.4, 0.7):
        weight = torch.randn(500, 400) * (torch.rand(500, 400) < density)
        weight[weight == 0] = 0
        entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
        floor = weight.numel() * entropy / 8 + 4 * int(weight.count_nonzero())
        assert save_packed({"weight": weight}, path) < floor + 700


def test_the_same_tensors_give_the_same_bytes(path, tmp_path):
    files = [tmp_path / f"{i}.packed" for i in range(5)]
    for file in files:
        save_packed(network().state_dict(), file)
    assert len({file.read_bytes() for file in files}) == 1


class TestFloat16:
    def test_rounds_the_survivors_of_pruned_weights_and_nothing_else(self, path):
        state = network().state_dict() | {
            "double": torch.tensor([[0, 0.1]], dtype=torch.float64),
            "bfloat16": torch.tensor([[0, 0.1]], dtype=torch.bfloat16),
            "dense": torch.full((2, 2), 0.1),
            "vector": torch.tensor([0.0, 0.1]),
        }
        same_bytes = save_packed(state, path)
        assert save_packed(state, path, values="float16") < same_bytes
        rounded = {"0.weight", "3.weight", "double"}
        expected = {
            name: tensor.half().to(tensor.dtype) if name in rounded else tensor
            for name, tensor in state.items()
        }
        assert same(load_packed(path), expected)
        assert not torch.equal(expected["0.weight"], state["0.weight"])
        halved = {t.name for t in inspect_packed(path) if t.values == torch.float16}
        assert halved == rounded

    @pytest.mark.parametrize("value", [70000.0, 1e-9, -math.inf, math.nan])
    def test_keeps_the_bits_of_tensors_that_it_cannot_hold(self, path, value):
        state = {"weight": torch.tensor([[0.0, 0.1, value]])}
        save_packed(state, path, values="float16")
        assert same(load_packed(path), state)
        assert inspect_packed(path)[0].values == torch.float32

    def test_keeps_zeros_with_a_sign(self, path):
        save_packed({"weight": torch.tensor([[0.0, -0.0, 0.5]])}, path, values="float16")
        assert load_packed(path)["weight"].signbit().tolist() == [[False, True, False]]
        assert inspect_packed(path)[0].values == torch.float16


def test_names_read_those_tensors_alone(path):
    state = network().state_dict()
    save_packed(state, path)
    found = load_packed(path, names={"3.weight", "0.weight"})
    assert same(found, {name: state[name] for name in ("0.weight", "3.weight")})
    assert load_packed(path, names=[]) == {}
    # Whatever happened to the others does not matter.
    contents = load_file(path)
    offset = path.read_bytes().index(contents["data"].tobytes())
    first = inspect_packed(path)[0].bytes
    damaged = bytearray(path.read_bytes())
    damaged[offset + first :][: len(contents["data"]) - first] = bytes(
        len(contents["data"]) - first
    )
    damaged[offset + first : offset + len(contents["data"])] = bytes(len(contents["data"]) - first)
    path.write_bytes(damaged)
    assert same(load_packed(path, names=["0.weight"]), {"0.weight": state["0.weight"]})
    with pytest.raises(ValueError, match=r"checksum of '0\.bias' does not match"):
        load_packed(path)


def test_unknown_names_are_refused_with_near_ones(path):
    save_packed(network().state_dict(), path)
    with pytest.raises(ValueError, match=r"got '3\.wait'; near names: 3\.weight"):
        load_packed(path, names=["0.weight", "3.wait"])
    with pytest.raises(TypeError, match="brackets"):
        load_packed(path, names="0.weight")


class TestDamage:
    def test_every_flipped_bit_is_noticed(self, path):
        save_packed(network().state_dict(), path)
        whole = path.read_bytes()
        draw = random.Random(0)
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"model\.packed"):
                load_packed(path)

    def test_every_other_damage_is_noticed(self, path):
        save_packed(network().state_dict(), path)
        whole = path.read_bytes()
        draw = random.Random(0)
        for _ in range(300):
            start, end = sorted(draw.choices(range(len(whole)), k=2))
            middle = draw.choice([b"", bytes(end - start), draw.randbytes(end - start), b"more"])
            damaged = whole[:start] + middle + whole[end:]
            if damaged != whole:
                path.write_bytes(damaged)
                with pytest.raises(ValueError, match=r"model\.packed"):
                    load_packed(path)
        assert whole.count(b'"U8"') == 3
        path.write_bytes(whole.replace(b'"U8"', b'"I8"', 1))
        with pytest.raises(ValueError, match="another kind of tensor"):
            load_packed(path)
        for length in (0, 1, 8, 100, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match="truncated"):
                load_packed(path)

    @staticmethod
    def forge(path, **about):
        """Write other entries into the index, with checksums that fit."""
        contents = load_file(path)
        index = json.loads(zstandard.decompress(contents["index"].tobytes()))
        index[0] |= about.pop("entry", {})
        index = about.pop("index", lambda given: given)(index)
        listed = json.dumps(index).encode()
        frame = zstandard.compress(listed)
        known = {"version": 1, "index_bytes": len(listed), "index_crc32": zlib.crc32(frame)}
        metadata = {"pruneflow.packed": json.dumps(known | about)}
        save_file(contents | {"index": np.frombuffer(frame, np.uint8)}, path, metadata)

    @pytest.mark.parametrize(
        "entry",
        [
            {"shape": [2**40, 2**40]},
            {"shape": [10**15]},
            {"shape": [-40, -50]},
            {"shape": [2, 2]},
            {"shape": [40, 50.0]},
            {"shape": None},
            {"dtype": "float64"},
            {"dtype": "float999"},
            {"dtype": ["float32"]},
            {"values": "float16"},
            {"values": "int32"},
            {"kept": 1},
            {"kept": 10**15},
            {"positions": "all"},
            {"positions": "mask"},
            {"positions": "run"},
            {"start": -1},
            {"start": 10**15},
            {"streams": []},
            {"streams": [[10**12, 4]] * 5},
            {"streams": [[10**15, 100]] * 5},
            {"streams": [[-4, -4]] * 5},
            {"crc32": 0},
            {"code": "import os"},
        ],
        ids=str,
    )
    def test_an_index_that_lies_is_refused(self, path, entry):
        torch.manual_seed(0)
        save_packed({"weight": sparse(40, 50, density=0.05)}, path)
        assert inspect_packed(path)[0].nonzeros > 1
        self.forge(path)
        load_packed(path)
        self.forge(path, entry=entry)
        with pytest.raises(ValueError, match="damaged"):
            load_packed(path)

    @pytest.mark.parametrize(
        ("index", "words"),
        [
            (lambda index: [*index, index[0] | {"name": "b"}], "does not start where the previous"),
            (lambda index: [*index, index[0]], "two tensors named 'weight'"),
            (lambda index: [index[1], index[0]], "does not start where the previous"),
            (
                lambda index: [index[0], index[1] | {"start": 3}],
                "does not start where the previous",
            ),
            (lambda index: [index[0], index[1] | {"same_as": "weight"}], "tied to 'weight'"),
            (lambda index: [index[0], index[1] | {"same_as": "bias"}], "tied to 'bias'"),
            (lambda index: [index[0], index[1] | {"same_as": "nothing"}], "tied to 'nothing'"),
            (lambda index: [index[0], index[1] | {"same_as": ["weight"]}], "tied to"),
            (lambda index: [index[2] | {"same_as": "weight"}, index[0]], "tied to 'weight'"),
            (
                lambda index: [*index, index[2] | {"name": "c", "same_as": "tied"}],
                "tied to 'tied'",
            ),
            (lambda index: [*index[:2], index[2] | {"dtype": "int32"}], "have another dtype"),
            (lambda index: [*index[:2], index[2] | {"shape": [50, 40]}], "tied to 'weight'"),
            (lambda index: [index[0] | {"name": 5}], "the name 5 is not text"),
            (lambda index: [index[0] | {"name": None}], "the name None is not text"),
            (lambda index: [index[0] | {"name": "a\ud800"}], r"the name 'a\ud800' is not text"),
            (lambda index: [index[0] | {"shape": [True, 2]}], "shape of 'weight' is not a list"),
            (lambda index: [index[0] | {"shape": [1] * 65}], "shape of 'weight' is not a list"),
            (lambda index: [index[0] | {"kept": 2.0}], "the counts of 'weight' are not"),
            (lambda index: [index[0] | {"streams": [[1]]}], "streams of 'weight' are not pairs"),
            (lambda index: {"weight": index[0]}, "its index is not a list of tensors"),
            (lambda index: ["weight"], "its index is not a list of tensors"),
            (lambda index: None, "its index is not a list of tensors"),
        ],
    )
    def test_entries_that_contradict_each_other_are_refused(self, path, index, words):
        torch.manual_seed(0)
        weight = sparse(40, 50, density=0.05)
        save_packed({"weight": weight, "bias": torch.rand(5), "tied": weight}, path)
        self.forge(path)
        load_packed(path)
        self.forge(path, index=index)
        for read in (load_packed, inspect_packed):
            with pytest.raises(ValueError, match="damaged") as refused:
                read(path)
            assert words in str(refused.value)

    def test_zeros_that_no_byte_stands_for_are_bounded(self, path):
        save_packed({"weight": torch.zeros(10)}, path)
        self.forge(path, entry={"shape": [2**28]})
        assert load_packed(path)["weight"].shape == (2**28,)  # which takes no memory unless used
        self.forge(path, entry={"shape": [2**30]})
        with pytest.raises(ValueError, match="would take 4294967296 bytes"):
            load_packed(path)

        def many(index):
            return [index[0] | {"name": str(name), "shape": [2**28]} for name in range(100)]

        self.forge(path, entry={"shape": [10]}, index=many)
        with pytest.raises(ValueError, match="would take 107374182400 bytes"):
            load_packed(path)

    def test_one_value_is_not_spread_over_many_positions(self, path):
        save_packed({"weight": torch.ones(1)}, path)
        self.forge(path, entry={"shape": [100]})
        with pytest.raises(ValueError, match="numbers of values and positions differ"):
            load_packed(path)

    def test_bytes_that_are_left_out_are_not_taken_for_zeros(self, path):
        save_packed({"weight": torch.rand(100)}, path)
        assert load_file(path)["data"].size > 200  # the first two streams are stored as they are
        crc32 = zlib.crc32(load_file(path)["data"][:200].tobytes())
        self.forge(path, entry={"streams": [[100, 100]] * 2, "crc32": crc32})
        with pytest.raises(ValueError, match="a stream is missing"):
            load_packed(path)

    def test_a_length_that_lies_allocates_nothing(self, path):
        save_packed({"weight": torch.ones(1000)}, path)
        huge = bytes([40, 181, 47, 253, 0b11100000]) + (2**50).to_bytes(8, "little")
        assert zstandard.frame_content_size(huge) == 2**50
        contents = load_file(path) | {"data": np.frombuffer(huge, np.uint8)}
        save_file(contents, path)
        crc32 = zlib.crc32(huge)
        self.forge(path, entry={"streams": [[2**50, len(huge)]], "crc32": crc32})
        with pytest.raises(ValueError, match="a stream is too short for its size"):
            load_packed(path)
        self.forge(path, index_bytes=2**50)
        with pytest.raises(ValueError, match="index is too long"):
            inspect_packed(path)

    def test_a_dtype_that_is_not_known_is_refused_by_name(self, path):
        save_packed({"weight": torch.ones(2)}, path)
        for key in ("dtype", "values"):
            self.forge(path, entry={key: "float999"})
            with pytest.raises(ValueError, match="'float999' is not a dtype of this version"):
                inspect_packed(path)

    def test_another_version_is_refused_by_name(self, path):
        save_packed(network().state_dict(), path)
        self.forge(path, version=2)
        for read in (load_packed, inspect_packed):
            with pytest.raises(ValueError, match=r"version 1, got version 2 .*; update pruneflow"):
                read(path)

    def test_other_files_are_refused_by_name(self, path):
        save_file({"weight": np.ones(3)}, path)
        with pytest.raises(ValueError, match="a plain safetensors file; read it with"):
            load_packed(path)
        torch.save({"weight": torch.ones(3)}, path)
        with pytest.raises(ValueError, match="another kind of file"):
            load_packed(path)
        with pytest.raises(FileNotFoundError, match="check the path"):
            load_packed(path.with_name("missing"))
        with pytest.raises(FileNotFoundError, match="check the path"):
            inspect_packed(path.parent)


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "what"),
        [
            (lambda: {"weight": torch.ones(2)}, "dict"),
            (lambda: 0.5, "float"),
            (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
            (lambda: torch.ones(2, device="meta"), "meta"),
            (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "qint8"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    @pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
    def test_what_is_no_plain_tensor(self, path, make, what):
        path.write_text("old")
        with pytest.raises(ValueError, match=rf"'state_dict'.*{what}.*to_dense"):
            save_packed({"weight": torch.ones(2), "state_dict": make()}, path)
        assert path.read_text() == "old"
        assert [file.name for file in path.parent.iterdir()] == ["model.packed"]

    def test_a_write_that_fails_leaves_the_old_file(self, path, monkeypatch):
        def fail(contents, file, metadata):
            file.write_text("half")
            raise OSError("the disk is full")

        path.write_text("old")
        monkeypatch.setattr("pruneflow.deploy.packed.save_file", fail)
        with pytest.raises(OSError, match="full"):
            save_packed({}, path)
        assert path.read_text() == "old"
        assert [file.name for file in path.parent.iterdir()] == ["model.packed"]

    def test_values_of_another_name(self, path):
        with pytest.raises(ValueError, match="'same' or 'float16', got 'half'"):
            save_packed({}, path, values="half")


class TestCommands:
    @pytest.fixture
    def run(self, tmp_path, monkeypatch, capsys):
        """Run a command in the folder of its files; what it printed."""
        monkeypatch.chdir(tmp_path)

        def command(line):
            main(line.split())
            return capsys.readouterr().out

        return command

    @pytest.fixture
    def refused(self, run, capsys):
        def command(line):
            with pytest.raises(SystemExit) as caught:
                run(line)
            assert caught.value.code == 2
            (message,) = capsys.readouterr().err.splitlines()
            return message

        return command

    @pytest.mark.parametrize("source", ["m.safetensors", "m.pt", "m.ckpt"])
    def test_pack_and_unpack(self, run, source):
        state = network().state_dict()
        if source == "m.safetensors":
            save_tensors(state, source)
        else:
            torch.save({"epoch": 3, "state_dict": state} if source == "m.ckpt" else state, source)
        assert "times smaller" in run(f"pack {source} m.packed")
        run("unpack m.packed again.safetensors")
        found = load_tensors("again.safetensors")
        assert found.keys() == state.keys()
        assert same({name: found[name] for name in state}, state)
        if source != "m.safetensors":  # which said nothing of the versions of modules
            assert load_safetensors("again.safetensors")._metadata == state._metadata

    def test_inspect(self, run):
        tied = torch.tensor([[0, 0, 0.1, 0]])
        state = {"a": tied, "b": tied, "empty": torch.ones(0), "count": torch.tensor(1)}
        torch.save(state, "m.pt")
        run("pack m.pt m.packed --values float16")
        header, *rows, total, last = run("inspect m.packed").splitlines()
        assert header.split()[:3] == ["tensor", "shape", "dtype"]
        assert [" ".join(row.split()) for row in (*rows, total)] == [
            "a 1x4 float32 float16 4 1 25.00% 3",
            "b = a 1x4 float32 float16 4 1 25.00% 0",
            "empty 0 float32 float32 0 0 0",
            "count int64 int64 1 1 100.00% 8",
            "total 5 2 40.00% 11",
        ]
        assert "dense 24: " in last
        run("unpack m.packed again.safetensors")
        assert bits(load_tensors("again.safetensors")["b"]) == bits(tied.half().float())

    def test_errors_are_one_line_and_exit_code_2(self, refused, tmp_path):
        torch.save([1, 2], "list.pt")
        torch.save({"epoch": 3}, "other.pt")
        torch.save({"model": nn.Linear(1, 1)}, "module.pt")
        (tmp_path / "text.safetensors").write_text("what is this?\n\n")
        (tmp_path / "text.packed").write_text("")
        save_packed({"weight": torch.ones(1)}, "m.packed")
        assert "check the path" in refused("pack missing.pt m.packed")
        assert "got a list" in refused("pack list.pt m.packed")
        assert "got 'epoch': a int" in refused("pack other.pt m.packed")
        assert "not unpickled" in refused("pack module.pt m.packed")
        assert "not unpickled" in refused("pack text.safetensors m.packed")
        assert "another file" in refused("pack m.packed m.packed")
        assert "end in .safetensors" in refused("unpack m.packed again.pt")
        assert "truncated" in refused("unpack text.packed again.safetensors")
        assert "truncated" in refused("inspect text.packed")
        assert same(load_packed("m.packed"), {"weight": torch.ones(1)})
