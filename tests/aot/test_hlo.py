"""Traffic of small programs written by hand in the compiler's format."""

import pytest

from rtdmd_jax.aot import hlo
from rtdmd_jax.aot.hlo import group_size, traffic
from rtdmd_jax.aot.hlo_text import parse, shape_bytes

MODULE = """HloModule jit_f, is_scheduled=true

%slice (p0: bf16[6,256,64], p1: s32[]) -> bf16[1,256,64] {
  %p0 = bf16[6,256,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %cut = bf16[1,256,64]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,256,64}
}

%gather_start (q0: bf16[1,256,64]) -> (bf16[1,256,64], bf16[1,1024,64]) {
  %q0 = bf16[1,256,64]{2,1,0:S(1)} parameter(0)
  %gather.1 = bf16[1,1024,64]{2,1,0:S(1)} all-gather(%q0), channel_id=7, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={1}
  ROOT %both = (bf16[1,256,64]{2,1,0:S(1)}, bf16[1,1024,64]{2,1,0:S(1)}) tuple(%q0, %gather.1)
}

%gather_done (r0: bf16[1,256,64]) -> bf16[1,1024,64] {
  %r0 = bf16[1,256,64]{2,1,0:S(1)} parameter(0)
  ROOT %gather.2 = bf16[1,1024,64]{2,1,0:S(1)} all-gather(%r0), channel_id=7, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={1}
}

%body (b: (s32[], bf16[6,256,64], f32[1024,64])) -> (s32[], bf16[6,256,64], f32[1024,64]) {
  %b = (s32[]{:T(128)}, bf16[6,256,64]{2,1,0}, /*index=2*/f32[1024,64]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %w = bf16[6,256,64]{2,1,0} get-tuple-element(%b), index=1
  %x = f32[1024,64]{1,0} get-tuple-element(%b), index=2
  %piece = bf16[1,256,64]{2,1,0:S(1)} fusion(%w, %i), kind=kLoop, calls=%slice
  %start = (bf16[1,256,64]{2,1,0:S(1)}, bf16[1,1024,64]{2,1,0:S(1)}) fusion(%piece), kind=kCustom, calls=%gather_start
  %done = bf16[1,1024,64]{2,1,0:S(1)} fusion(%piece), kind=kCustom, calls=%gather_done
  %sum = f32[1024,64]{1,0} all-reduce(%x), channel_id=9, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %out = (s32[]{:T(128)}, bf16[6,256,64]{2,1,0}, f32[1024,64]{1,0}) tuple(%i, %w, %sum)
}

%condition (c: (s32[], bf16[6,256,64], f32[1024,64])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[6,256,64]{2,1,0}, f32[1024,64]{1,0}) parameter(0)
  %n = s32[]{:T(128)} constant(6)
  %j = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %n), direction=LT
}

ENTRY %main (a: f32[1024,64], t: (s32[], bf16[6,256,64], f32[1024,64])) -> f32[1024,64] {
  %a = f32[1024,64]{1,0} parameter(0)
  %t = (s32[]{:T(128)}, bf16[6,256,64]{2,1,0}, f32[1024,64]{1,0}) parameter(1)
  %loop = (s32[]{:T(128)}, bf16[6,256,64]{2,1,0}, f32[1024,64]{1,0}) while(%t), condition=%condition, body=%body
  %r = f32[1024,64]{1,0} get-tuple-element(%loop), index=2
  ROOT %total = f32[1024,64]{1,0} add(%a, %r)
}
"""  # noqa: E501

GATHERED = 1024 * 64 * 2
X = 1024 * 64 * 4


def test_loops_multiply_collectives_and_parts_of_one_count_once():
  got = traffic(MODULE)
  assert got.count == {"all-gather": 6, "all-reduce": 6}
  assert got.sent["all-gather"] == 6 * GATHERED * 3 / 4
  assert got.sent["all-reduce"] == 6 * X * 2 * 1 / 2
  assert got.unknown_loops == 0


def test_a_loop_may_say_how_often_it_turns():
  loop = "while(%t), condition=%condition, body=%body"
  said = MODULE.replace(loop, loop + ', backend_config={"known_trip_count":{"n":"4"}}')
  assert said != MODULE and traffic(said).count == {"all-gather": 4, "all-reduce": 4}


def test_memory_is_slices_and_what_is_not_on_chip():
  # Each turn reads the slice and its index, and reads and writes x; the end reads two, writes one.
  assert traffic(MODULE).memory == 6 * (256 * 64 * 2 + 4 + 2 * X) + 3 * X


def test_expected_cycles_are_those_of_all_turns():
  said = ', backend_config={"window_config":{"estimated_cycles":"%d","iteration_bounds":["1"]}}'
  text = MODULE.replace("calls=%slice", "calls=%slice" + said % 20)
  text = text.replace("add(%a, %r)", "add(%a, %r)" + said % 7)
  assert traffic(text).cycles == 6 * 20 + 7 and traffic(MODULE).cycles == 0


def test_a_loop_without_a_constant_end_uses_the_turns_it_is_given():
  unknown = MODULE.replace("s32[]{:T(128)} constant(6)", "s32[]{:T(128)} copy(%j)")
  got = traffic(unknown, 3)
  assert got.unknown_loops == 1
  assert got.count == {"all-gather": 3, "all-reduce": 3}


def test_a_conditional_counts_its_most_expensive_branch():
  text = """HloModule m

%small (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

%large (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %s = f32[8]{0} all-reduce(%q), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
}

ENTRY %main (c: s32[], x: f32[8]) -> f32[8] {
  %c = s32[] parameter(0)
  %x = f32[8]{0} parameter(1)
  ROOT %y = f32[8]{0} conditional(%c, %x, %x), branch_computations={%small, %large}
}
"""
  got = traffic(text)
  assert got.count == {"all-reduce": 1}
  assert got.sent["all-reduce"] == 32 * 2 * 3 / 4
  assert got.memory == 64


@pytest.mark.parametrize(
  "text, size",
  [
    ("replica_groups={{0,1,2},{3,4,5}}, x", 3),
    ("replica_groups=[2,4]<=[8], x", 4),
    ("replica_groups=[4,2]<=[2,4]T(1,0), x", 2),
    ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}, x", 8),
    ("replica_groups=mesh['a'=4,'b'=2] {'b'}, x", 2),
    ("source_target_pairs={{0,1},{1,0}}", 2),
  ],
)
def test_group_sizes(text, size):
  assert group_size(text) == size


def test_an_unknown_group_is_an_error():
  with pytest.raises(ValueError, match="devices of the collective"):
    group_size("replica_groups=whatever")


@pytest.mark.parametrize(
  "shape, size, off_chip",
  [
    ("bf16[6,256,64]{2,1,0:T(8,128)(2,1)}", 196608, 196608),
    ("bf16[6,256,64]{2,1,0:T(8,128)(2,1)S(1)}", 196608, 0),
    ("(f32[2]{0}, pred[3]{0}, s32[]{:T(128)})", 15, 15),
    ("f8e4m3fn[16]{0}", 16, 16),
    ("s4[16]{0}", 8, 8),
  ],
)
def test_shapes(shape, size, off_chip):
  assert shape_bytes(shape) == size
  assert shape_bytes(shape, on_chip=False) == off_chip


def test_what_is_no_module_is_an_error():
  with pytest.raises(ValueError, match="ENTRY"):
    parse("nothing here")


def test_async_forms_count_the_whole_array_once():
  text = """HloModule m

ENTRY %main (x: f32[8]) -> f32[32] {
  %x = f32[8]{0} parameter(0)
  %s = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %d = f32[32]{0} all-gather-done(%s)
}
"""  # noqa: E501
  got = traffic(text)
  assert got.count == {"all-gather": 1}
  assert got.sent["all-gather"] == 128 * 3 / 4
  assert hlo.traffic(text).unknown_loops == 0


def test_of_an_asynchronous_slice_into_on_chip_memory_the_slice_is_read():
  text = """HloModule m

%fetch (p: f32[6,8]) -> f32[1,8] {
  %p = f32[6,8]{1,0} parameter(0)
  ROOT %cut = f32[1,8]{1,0:S(1)} slice(%p), slice={[2:3], [0:8]}
}

ENTRY %main (x: f32[6,8]) -> f32[1,8] {
  %x = f32[6,8]{1,0} parameter(0)
  %s = ((f32[6,8]{1,0}), f32[1,8]{1,0:S(1)}, s32[]{:S(2)}) async-start(%x), calls=%fetch
  ROOT %d = f32[1,8]{1,0:S(1)} async-done(%s)
}
"""
  assert traffic(text).memory == 8 * 4


def test_a_slice_inside_a_fusion_of_a_fusion_is_all_that_is_read_or_written():
  text = """HloModule m

%inner (p: f32[6,8], i: s32[]) -> f32[8] {
  %p = f32[6,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %cut = f32[1,8]{1,0} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,8}
  ROOT %flat = f32[8]{0} bitcast(%cut)
}

%outer (q: f32[6,8], j: s32[], w: f32[8]) -> f32[8] {
  %q = f32[6,8]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %w = f32[8]{0} parameter(2)
  %part = f32[8]{0} fusion(%q, %j), kind=kLoop, calls=%inner
  ROOT %product = f32[8]{0} multiply(%part, %w)
}

%put (r: f32[6,8], x: f32[8], k: s32[]) -> f32[6,8] {
  %r = f32[6,8]{1,0} parameter(0)
  %x = f32[8]{0} parameter(1)
  %k = s32[] parameter(2)
  %z2 = s32[] constant(0)
  %row = f32[1,8]{1,0} bitcast(%x)
  ROOT %new = f32[6,8]{1,0} dynamic-update-slice(%r, %row, %k, %z2)
}

%store (s: f32[6,8], y: f32[8], l: s32[]) -> f32[6,8] {
  %s = f32[6,8]{1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %l = s32[] parameter(2)
  ROOT %stored = f32[6,8]{1,0} fusion(%s, %y, %l), kind=kLoop, calls=%put
}

ENTRY %main (a: f32[6,8], n: s32[], b: f32[8]) -> f32[6,8] {
  %a = f32[6,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %b = f32[8]{0} parameter(2)
  %space = f32[6,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %read = f32[8]{0} fusion(%a, %n, %b), kind=kOutput, calls=%outer
  ROOT %written = f32[6,8]{1,0} fusion(%space, %read, %n), kind=kLoop, calls=%store
}
"""
  row, index = 8 * 4, 4
  read = row + index + row + row  # the slice, its place, the factor; the product
  written = row + index + row
  assert traffic(text).memory == read + written


def test_a_slice_that_something_else_reads_whole_is_read_whole():
  text = """HloModule m

%f (p: f32[6,8], i: s32[]) -> f32[6,8] {
  %p = f32[6,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %cut = f32[1,8]{1,0} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,8}
  ROOT %sum = f32[6,8]{1,0} add(%p, %p)
}

ENTRY %main (a: f32[6,8], n: s32[]) -> f32[6,8] {
  %a = f32[6,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %r = f32[6,8]{1,0} fusion(%a, %n), kind=kLoop, calls=%f
}
"""
  assert traffic(text).memory == 2 * 6 * 8 * 4 + 4


GPU = """HloModule jit_f, is_scheduled=true

%sliced (s0: f32[6,64,64], s1: f32[64,64], s2: s32[]) -> (f32[64,64], s8[4194304]) {
  %s0 = f32[6,64,64]{2,1,0} parameter(0)
  %s1 = f32[64,64]{1,0} parameter(1)
  %s2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %cut = f32[1,64,64]{2,1,0} dynamic-slice(%s0, %s2, %zero, %zero), dynamic_slice_sizes={1,64,64}
  %flat = f32[64,64]{1,0} bitcast(%cut)
  ROOT %product = (f32[64,64]{1,0}, s8[4194304]{0}) custom-call(%flat, %s1), custom_call_target="__cublas$lt$matmul"
}

%region (r: (s32[], f32[6,64,64], f32[64,64])) -> (s32[], f32[6,64,64], f32[64,64]) {
  %r = (s32[], f32[6,64,64]{2,1,0}, f32[64,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%r), index=0
  %w = f32[6,64,64]{2,1,0} get-tuple-element(%r), index=1
  %x = f32[64,64]{1,0} get-tuple-element(%r), index=2
  %both = (f32[64,64]{1,0}, s8[4194304]{0}) fusion(%w, %x, %i), kind=kCustom, calls=%sliced, backend_config={"fusion_backend_config":{"kind":"__custom_fusion"}}
  %y = f32[64,64]{1,0} get-tuple-element(%both), index=0
  %s = f32[64,64]{1,0} fusion(%y), kind=kCustom, calls=%soft, backend_config={"fusion_backend_config":{"kind":"__triton"}}
  ROOT %out = (s32[], f32[6,64,64]{2,1,0}, f32[64,64]{1,0}) tuple(%i, %w, %s)
}

%soft (t0: f32[64,64]) -> f32[64,64] {
  %t0 = f32[64,64]{1,0} parameter(0)
  ROOT %t1 = f32[64,64]{1,0} exponential(%t0)
}

%condition (c: (s32[], f32[6,64,64], f32[64,64])) -> pred[] {
  %c = (s32[], f32[6,64,64]{2,1,0}, f32[64,64]{1,0}) parameter(0)
  %n = s32[] constant(6)
  %j = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (q: f32[2,4,64,64], t: (s32[], f32[6,64,64], f32[64,64])) -> f32[64,64] {
  %q = f32[2,4,64,64]{3,2,1,0} parameter(0)
  %t = (s32[], f32[6,64,64]{2,1,0}, f32[64,64]{1,0}) parameter(1)
  %loop = (s32[], f32[6,64,64]{2,1,0}, f32[64,64]{1,0}) while(%t), condition=%condition, body=%region
  %a = (f32[2,4,64,64]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax"
  %b = (f32[2,4,64,64]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  ROOT %end = f32[64,64]{1,0} get-tuple-element(%loop), index=2
}
"""  # noqa: E501


def test_kernels_of_a_gpu_by_kind():
  got = traffic(GPU)
  assert dict(got.kernels) == {
    "cuBLAS": 6, "Triton": 6, "cuDNN attention": 1, "cuDNN attention backward": 1,
  }  # fmt: skip
  # The slice of the stack that a product reads, and no workspaces.
  tile, heads = 64 * 64 * 4, 2 * 4 * 64 * 64 * 4
  assert got.memory == 6 * (2 * tile + 4 + tile + 2 * tile) + 2 * 4 * heads
