"""Host-side C++ of the kernels: tiles, shared memory, split geometry, caches."""

from __future__ import annotations

from types import ModuleType

import host_build
import pytest

SHARED_MEMORY_SM86 = 99 * 1024  # what one block may ask for on sm_86 and sm_89, the least of all


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("host")
    return host_build.build("host_module", folder, f"-I{host_build.TESTS / 'fake_cuda'}")


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("hides_rows", [False, True])
def test_attention_tiles_fit(host, head_dim, element_bytes, hides_rows):
    """Shared memory fits every device from sm_80 on, and rows stay on 16-byte boundaries."""
    assert host.attention_shared_bytes(head_dim, element_bytes, hides_rows) <= SHARED_MEMORY_SM86
    stride = host.attention_tile_stride(head_dim, element_bytes)
    assert stride % 16 == 0 and stride >= head_dim * element_bytes
    rows, keys, warps = host.attention_tile(head_dim, element_bytes, hides_rows)
    assert rows % (16 * warps) == 0 and keys % 16 == 0
    # A warp copies keys / warps rows at once: they must not leave a page (a multiple of 16 keys).
    assert keys % warps == 0 and 16 % (keys // warps) == 0


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_attention_backward_tiles_fit(host, head_dim, element_bytes):
    """Two KB are left for what the kernels keep beside their tiles."""
    shared_bytes = host.attention_backward_shared_bytes(head_dim, element_bytes)
    assert shared_bytes + 2048 <= SHARED_MEMORY_SM86
    rows, columns, warps = host.attention_backward_tile(head_dim, element_bytes)
    assert rows == 16 * warps and columns % 16 == 0 and columns <= 64
    assert columns % warps == 0 and columns // warps % 4 == 0  # rows that a warp copies


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_sm90_tiles_suit_the_instructions(host, head_dim):
    """Panels divide a row; shared memory, the registers of a thread and the box of a copy suffice."""
    panel = host.attention_sm90_panel_bytes(head_dim)
    assert panel in (32, 64, 128) and head_dim * 2 % panel == 0
    for rows, keys in host.attention_sm90_tiles(head_dim):
        assert rows == 2 * 64 and keys % 16 == 0 and keys <= 256
        assert (rows + 2 * 2 * keys) * head_dim * 2 + 2048 <= 227 * 1024
        assert keys // 2 + keys // 4 + head_dim // 2 <= 216  # scores, weights, output


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 8, 9])
def test_clusters_share_tiles_where_that_is_shorter(host, tiles):
    """132 multiprocessors, a block each: rounds of one tile or of all, and one tile's time more."""
    rounds = {1: lambda blocks: -(-blocks // 132) * tiles}
    rounds[tiles] = lambda blocks: -(-blocks * tiles // 132) + 1
    for blocks in range(1, 1200):
        cluster = host.cross_sm90_cluster(blocks, tiles, 132)
        assert cluster == 1 or (cluster == tiles <= 8 and tiles > 1)
        assert rounds[cluster](blocks) <= rounds[1](blocks)
    # 11B, 4 tiles: 32, 512 and 2048 rows are 8, 128 and 512 blocks.
    assert [host.cross_sm90_cluster(blocks, 4, 132) for blocks in (8, 128, 512)] == [4, 1, 1]


def test_what_tensor_maps_take(host):
    """Rows that do not overlap, 16-byte strides below 2^40 bytes."""
    assert not host.mappable(2, 68, 64, 2) and host.mappable(2, 72, 64, 2)
    assert not host.mappable(0, 64, 64, 2) and host.mappable(1 << 32, 64, 64, 2)


def test_a_refused_tensor_map_names_its_dimension(host):
    good = [[64, 1, 64], [100, 64, 128], [2, 6400, 1]]
    assert "dimension 0 has size 64" in host.tensor_map_fault(good, 2)  # all, if none stands out
    assert "dimension 2 has size 2" in host.tensor_map_fault(good, 2)
    for dim, field, value in [(1, 1, 0), (1, 1, 68), (2, 1, 1 << 39), (2, 0, 0), (1, 2, 512)]:
        bad = [list(d) for d in good]
        bad[dim][field] = value
        text = host.tensor_map_fault(bad, 2)
        assert text.startswith(f"dimension {dim} has") and str(value) in text.split(";")[0]
        assert "expected" in text and f"dimension {3 - dim}" not in text


@pytest.mark.parametrize("page_size", range(16, 1025, 16))
def test_copies_stay_in_their_page(host, page_size):
    keys = host.attention_sm90_tiles(128)[0][1]
    rows = host.page_box_rows(page_size, keys)
    assert page_size % rows == 0 and keys % rows == 0 and 16 <= rows <= keys


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_ldmatrix_rows_hit_distinct_banks(host, head_dim):
    """Eight rows of 16 bytes, as one ldmatrix reads them, lie in eight different groups of four banks."""
    stride = host.attention_tile_stride(head_dim, 2)
    swizzled = host.attention_tile_swizzled(head_dim, 2)
    for chunk in range(head_dim * 2 // 16):
        groups = set()
        for row in range(8):
            column = chunk ^ (row % 8) if swizzled else chunk
            groups.add((row * stride // 16 + column) % 8)
        assert len(groups) == 8


def test_paged_splits_cover_the_capacity(host):
    """Every key is in exactly one split, splits are whole products wide, and few enough to pay off."""
    for capacity in [1, 16, 64, 255, 256, 257, 4096, 4097, 8192, 32768, 32769, 131072]:
        splits, size = host.paged_splits(capacity)
        assert size % 16 == 0
        assert (splits - 1) * size < capacity <= splits * size
        assert splits <= 64


def test_tile_splits_cover_a_tile(host):
    for tokens in [1, 17, 512, 513, 1025, 1601, 6404]:
        splits, size = host.tile_splits(tokens)
        assert size % 16 == 0
        assert (splits - 1) * size < tokens <= splits * size
    assert host.tile_splits(1601) == (
        4,
        416,
    )  # 4 tiles x 4 splits x 8 heads: 128 blocks, one wave of 132


def test_split_workspace_is_linear_in_the_batch(host):
    one = host.split_kv_workspace(1, 32, 16, 128)
    assert one == 32 * 16 * (128 + 2) * 4
    assert host.split_kv_workspace(7, 32, 16, 128) == 7 * one


def test_cluster_blocks_follow_the_batch(host):
    """A cluster per (sequence, key/value head): 16 blocks while the device holds them, then fewer."""
    assert [host.cluster_blocks(batch * 8, 4) for batch in (1, 2, 3, 4, 5, 32)] == [
        16,
        16,
        8,
        8,
        4,
        4,
    ]
    assert host.cluster_blocks(32 * 8, 8) == 8
    for pairs in [1, 16, 17, 33, 34, 10000]:
        for group in range(1, host.cluster_max_group + 1):
            assert (
                host.strands % (host.cluster_blocks(pairs, group) * 4) == 0
            )  # whole strands per warp


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_cluster_slices_cover_the_output_and_fit(host, head_dim):
    """Every quad of the group's output has a block, and two blocks share the 228 KB of a multiprocessor."""
    row = head_dim * 2 + 16
    rings = 4 * 2 * 2 * 16 * row  # 4 warps, 2 stages, a key and a value tile of 16 rows
    for group in range(1, host.cluster_max_group + 1):
        for pairs in [1, 20, 1000]:
            blocks = host.cluster_blocks(pairs, group)
            log2 = host.cluster_slice_log2(group, head_dim, blocks)
            assert blocks << log2 >= group * head_dim // 4
            merge = host.cluster_merge_bytes(group, log2)
            assert 2 * (rings + 8 * row + 2 * head_dim * 2 + 32 + merge + 1024) <= 228 * 1024


def test_integer_helpers(host):
    assert [host.ceil_div(n, 8) for n in (0, 1, 8, 9)] == [0, 1, 1, 2]
    assert [host.round_up(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]


def test_last_cache(host):
    assert host.bytes_of("32768K\n") == host.bytes_of("32M\n") == 32 << 20
    assert host.bytes_of("512") == 512 and host.bytes_of("") == 0
    assert host.cores_of("00000000,0000000f\n") == 4 and host.cores_of("3\n") == 2
    assert host.cores_of("") == 0
    one = host.last_cache_bytes(1)
    assert 2**17 <= one <= 2**31
    # Twice as many threads reach at most twice as much.
    assert one <= host.last_cache_bytes(64) <= 2 * host.last_cache_bytes(32) <= 64 * one
