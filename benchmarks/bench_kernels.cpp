// Microbenchmarks of the torch-free kernels, at the shapes of the models that bench_layer.py times. Nothing is timed
// before every kernel has been checked.
//
//   bench_kernels --benchmark_filter='rows/.*bfloat16' --benchmark_counters_tabular=true
//
// Weights stand in memory more than once, so that each iteration reads them from there: GB/s are of memory where few
// rows of x pass by, and GFLOP/s of the core where many do. One thread.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <string>

#include "benchmarks/kernel_cases.h"
#include "kernels/column_select.h"
#include "kernels/gated_activation.h"
#include "kernels/row_conversion.h"

namespace d2moe::kernels {

namespace {

constexpr int64_t kColdBytes = int64_t{256} << 20;

struct Shape {
  const char* name;
  int64_t inputs, outputs;
};

// One expert's gate and up, its down, and factors of a compressed one.
constexpr Shape kShapes[] = {{"Mixtral-8x7B_gate_up", 4096, 28672}, {"Mixtral-8x7B_down", 14336, 4096},
                             {"Qwen3-30B-A3B_gate_up", 2048, 1536}, {"Qwen3-30B-A3B_down", 768, 2048},
                             {"DeepSeek-MoE-16B_U", 208, 2816},     {"DeepSeek-MoE-16B_V", 2048, 208}};

void product(benchmark::State& state, const char* set, ElementType type, const Shape& shape, bool by_channel,
             int64_t kept_of_8) {
  const ProductKernels& kernels = *product_kernels(set, type);
  const int64_t num_rows = state.range(0), elements = shape.inputs * shape.outputs;
  const int64_t copies = std::max<int64_t>(1, kColdBytes / (elements * cases::size_of(type)));
  const cases::Elements weights(type, copies * elements, 1);
  const int64_t x_stride = shape.inputs + 32;
  const cases::Elements x(kernels.input_type, num_rows * x_stride, 2);
  constexpr int64_t kWidth = 512;  // outputs at a time, as the forward takes them
  const int64_t width = num_rows <= 16 ? std::min<int64_t>(2048, shape.outputs) : kWidth;
  std::vector<int32_t> channels;
  for (int64_t j = 0; j < shape.inputs; ++j) {
    if (j * 5 % 8 < kept_of_8) {
      channels.push_back(static_cast<int32_t>(j));
    }
  }
  const int64_t inputs = static_cast<int64_t>(channels.size());
  std::vector<const void*> rows(num_rows);
  std::vector<float> out(num_rows * width);
  std::vector<float*> out_rows(num_rows);
  for (int64_t m = 0; m < num_rows; ++m) {
    rows[m] = x.at(m * x_stride);
    out_rows[m] = out.data() + m * width;
  }
  int64_t copy = 0;
  for (auto _ : state) {
    const void* w = weights.at(copy * elements);
    for (int64_t begin = 0; begin < shape.outputs; begin += width) {
      const int64_t end = std::min(begin + width, shape.outputs);
      if (by_channel) {
        kernels.multiply_channels({w, shape.outputs, inputs, kept_of_8 < 8 ? channels.data() : nullptr, rows.data(),
                                   num_rows, begin, end, out_rows.data()});
      } else {
        kernels.multiply_rows({w, inputs, inputs, rows.data(), num_rows, begin, end, out_rows.data()});
      }
    }
    benchmark::DoNotOptimize(out.data());
    copy = (copy + 1) % copies;
  }
  const double spent = static_cast<double>(inputs * shape.outputs) * static_cast<double>(state.iterations());
  state.counters["GB/s"] = benchmark::Counter(spent * cases::size_of(type) * 1e-9, benchmark::Counter::kIsRate);
  state.counters["GFLOP/s"] = benchmark::Counter(2e-9 * spent * num_rows, benchmark::Counter::kIsRate);
}

void select(benchmark::State& state) {
  const int64_t count = state.range(0);
  std::vector<float> scores(count);
  std::vector<int32_t> selected(count);
  uint32_t random = 1;
  for (float& score : scores) {
    random = random * 1664525 + 1013904223;
    score = static_cast<float>(random >> 8);
  }
  for (auto _ : state) {
    select_columns(scores.data(), count, count * 4 / 7, selected.data());
    benchmark::DoNotOptimize(selected.data());
  }
}

void activate(benchmark::State& state) {
  const int64_t count = state.range(0);
  std::vector<float> values(2 * count, 0.7f);
  for (auto _ : state) {
    gated_activation(Activation::kSilu, count, false, 1.0f, values.data());
    benchmark::DoNotOptimize(values.data());
  }
}

void besides(benchmark::State& state) {
  const int64_t count = state.range(0), rank = count / 10;
  std::vector<BFloat16> source(count), out(count);
  std::vector<int32_t> pivots(rank);
  for (int64_t i = 0; i < rank; ++i) {
    pivots[i] = static_cast<int32_t>(i * 10 + i * 7 % 10);
  }
  for (auto _ : state) {
    take_row_besides(source.data(), ElementType::kBFloat16, pivots.data(), rank, count, out.data());
    benchmark::DoNotOptimize(out.data());
  }
}

void add_products() {
  for (const char* const* set = instruction_sets(); *set != nullptr; ++set) {
    for (const ElementType type : {ElementType::kBFloat16, ElementType::kFloat32}) {
      for (const Shape& shape : kShapes) {
        for (const int form : {0, 1, 2}) {
          const std::string name = std::string(form == 0   ? "rows"
                                               : form == 1 ? "channels"
                                                           : "half_the_channels") +
                                   "/" + *set + "/" + cases::name_of(type) + "/" + shape.name;
          benchmark::RegisterBenchmark(
              name.c_str(),
              [=](benchmark::State& state) { product(state, *set, type, shape, form > 0, form == 2 ? 4 : 8); })
              ->Arg(1)
              ->Arg(4)
              ->Arg(8)
              ->Arg(16)
              ->Arg(48)
              ->Arg(128)
              ->Arg(512)
              ->Unit(benchmark::kMillisecond);
        }
      }
    }
  }
}

}  // namespace

}  // namespace d2moe::kernels

int main(int argc, char** argv) {
  using namespace d2moe::kernels;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
    return 1;
  }
  if (!cases::validate()) {
    return 1;
  }
  add_products();
  benchmark::RegisterBenchmark("select_columns", &select)->Arg(2048)->Arg(14336);
  benchmark::RegisterBenchmark("gated_activation/silu", &activate)->Arg(14336);
  benchmark::RegisterBenchmark("take_row_besides", &besides)->Arg(2048)->Arg(14336);
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
