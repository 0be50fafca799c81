"""The emulation that CUDA kernels are tested on where there is no GPU: it must show what is wrong with a kernel."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tools.emulated import EMULATED, ROOT

# One kernel for each thing that can be wrong, by the number it is called with; prints what the kernel left.
PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels/launch.cuh"

using namespace d2moe::kernels;

void all_reach(float* out) {  // right: every thread's neighbour's value
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

void forgotten_barrier(float* out) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[threadIdx.x] = threadIdx.x;
  out[blockIdx.x * blockDim.x + threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

void some_reach(float* out) {
  if (threadIdx.x < 40) {
    __syncthreads();
    out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
  } else {
    out[threadIdx.x] = __shfl_sync(0xffffffffu, 2.0f, 0);
    __syncthreads();
  }
}

void forgotten_wait(float* out) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  alignas(16) static float source[4] = {1, 2, 3, 4};
  emulated_cuda::copy_later(shared, source, 16);
  emulated_cuda::close_copies();
  emulated_cuda::wait_copies(1);  // one too many
  out[blockIdx.x * blockDim.x + threadIdx.x] = shared[threadIdx.x % 4];
}

void copy_off_its_boundary(float* out) {
  static float source[8];
  emulated_cuda::copy_later(dynamic_shared(), source + 1, 16);
  out[0] = 0;
}

int main(int, char** arguments) {
  void (*const kernels[])(float*) = {all_reach, forgotten_barrier, some_reach, forgotten_wait, copy_off_its_boundary};
  std::vector<float> out(2 * 64, -1.0f);
  launch(kernels[std::atoi(arguments[1])], dim3(2), dim3(64), 64 * sizeof(float), nullptr, out.data());
  for (float value : out) std::printf("%g ", value);
}
"""
NEIGHBOURS = [*range(1, 64), 0]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which("c++")
    assert compiler, "the native build needs a C++ compiler, too"
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "main.cpp").write_text(PROGRAM)
    options = ["-std=c++17", "-O1", "-DD2MOE_EMULATED", "-U_FORTIFY_SOURCE", f"-I{EMULATED}", f"-I{ROOT / 'csrc'}"]
    sources = [str(folder / "main.cpp"), str(EMULATED / "emulator.cpp")]
    subprocess.run([compiler, *options, *sources, "-o", str(folder / "main")], check=True)
    return folder / "main"


def run(program, kernel):
    done = subprocess.run([str(program), str(kernel)], capture_output=True, text=True, check=False)
    return done.returncode, [float(value) for value in done.stdout.split()], done.stderr


def test_a_right_kernel(program):
    assert run(program, 0) == (0, [*NEIGHBOURS, *NEIGHBOURS], "")


def test_a_forgotten_barrier_shows_in_every_block(program):
    code, values, _ = run(program, 1)
    assert code == 0
    assert values[:64] != NEIGHBOURS
    assert values[64:] != NEIGHBOURS


def test_a_barrier_that_some_never_reach_ends_with_a_sentence(program):
    code, _, error = run(program, 2)
    assert code != 0
    assert "emulated_cuda: a barrier must be reached by all threads of a block" in error
    assert "in block (0, 0, 0) of (2, 1, 1)." in error


def test_copies_are_there_only_once_they_were_waited_for(program):
    code, values, _ = run(program, 3)
    assert code == 0
    assert all(value != value for value in values)


def test_a_copy_off_its_boundary_ends_with_a_sentence(program):
    code, _, error = run(program, 4)
    assert code != 0
    assert "cp.async must have aligned addresses" in error
