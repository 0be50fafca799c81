// Products of a few rows of x: weights pass through registers on their way from memory. Part of product_loops.h.
namespace d2moe::kernels {
namespace {

// out[m][n + i] += the sum of sums[m][i]. Outputs of a tile of 3 and of one alone are added up in the same order, so
// that it does not matter where a call's outputs begin and end; tiles of 4 leave none over but at the end of the
// matrix.
template <typename Isa, int M, int N>
inline void add_totals(const typename Isa::Vector (*sums)[N], float* const* out, int64_t n) {
  if constexpr (N % 4 == 0) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
      for (int i = 0; i < N; i += 4) {
        Isa::add_four_totals(sums[m] + i, out[m] + n + i);
      }
    }
    return;
  }
  constexpr int kFours = M / 4 * 4;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 2
    for (int m = 0; m < kFours; m += 4) {
      const typename Isa::Vector four[4] = {sums[m][i], sums[m + 1][i], sums[m + 2][i], sums[m + 3][i]};
      float totals[4] = {};
      Isa::add_four_totals(four, totals);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        out[m + r][n + i] += totals[r];
      }
    }
#pragma GCC unroll 4
    for (int m = kFours; m < M; ++m) {
      out[m][n + i] += Isa::total(sums[m][i]);
    }
  }
}

// N outputs side by side. `first` tells the rows of x that read these weights first, from memory: they call for the
// next tile's ahead of time.
template <typename Isa, int M, int N, bool first>
inline void multiply_row_tile(const typename Isa::Input* const* x, int64_t x_begin, const typename Isa::Weight* w,
                              int64_t stride, int64_t length, float* const* out, int64_t n) {
  constexpr int64_t kStep = int64_t{Isa::kLanes} * Isa::kDepth;
  typename Isa::Vector sums[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      sums[m][i] = Isa::zero();
    }
  }
  // The next tile's weights; where rows are short, those of a later one.
  constexpr int64_t kAhead = tuning::kAheadBytes / static_cast<int64_t>(sizeof(typename Isa::Weight));
  const auto* next = w + (N * stride > kAhead ? N * stride : kAhead);
  int64_t k = 0;
  for (; k + kStep <= length; k += kStep) {
    typename Isa::Operand weights[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      weights[i] = Isa::load(w + i * stride + k);
      if constexpr (first) {
        __builtin_prefetch(next + i * stride + k);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const typename Isa::Operand input = Isa::load(x[m] + x_begin + k);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        sums[m][i] = Isa::multiply_add(weights[i], input, sums[m][i]);
      }
    }
  }
  if (k < length) {
    for (int m = 0; m < M; ++m) {
      const typename Isa::Operand input = Isa::load_part(x[m] + x_begin + k, length - k);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        sums[m][i] = Isa::multiply_add(Isa::load_part(w + i * stride + k, length - k), input, sums[m][i]);
      }
    }
  }
  add_totals<Isa, M, N>(sums, out, n);
}

// N outputs one after the other: W is read as it stands in memory, which prefetching hardware is made for. An input is
// loaded for every output anew, so that this is for fewer rows of x than multiply_row_tile.
template <typename Isa, int M, int N>
inline void multiply_row_lines(const typename Isa::Input* const* x, int64_t x_begin, const typename Isa::Weight* w,
                               int64_t stride, int64_t length, float* const* out, int64_t n) {
  constexpr int64_t kStep = int64_t{Isa::kLanes} * Isa::kDepth;
  constexpr int64_t kAhead = tuning::kAheadBytes / static_cast<int64_t>(sizeof(typename Isa::Weight));
  constexpr int kSums = M <= 2 ? 8 : M <= 4 ? 4 : 2;  // of each row: the additions of one would wait for one another
  typename Isa::Vector totals[M][N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    typename Isa::Vector sums[M][kSums];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int s = 0; s < kSums; ++s) {
        sums[m][s] = Isa::zero();
      }
    }
    const auto* row = w + i * stride;
    const auto add = [&](int64_t k, int s, const auto* ahead) {
      const typename Isa::Operand weights = Isa::load(row + k);
      __builtin_prefetch(ahead);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        sums[m][s] = Isa::multiply_add(weights, Isa::load(x[m] + x_begin + k), sums[m][s]);
      }
    };
    // What is read kAhead later: of this output, or the next one.
    const auto later = [&](int64_t k) {
      return k + kAhead < length ? row + k + kAhead : row + stride + (k + kAhead - length);
    };
    int64_t k = 0;
    for (; k + kSums * kStep <= length; k += kSums * kStep) {
      const auto* ahead = later(k);
#pragma GCC unroll 8
      for (int s = 0; s < kSums; ++s) {
        add(k + s * kStep, s, ahead + s * kStep);
      }
    }
    for (; k + kStep <= length; k += kStep) {
      add(k, 0, later(k));
    }
    if (k < length) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        sums[m][0] = Isa::multiply_add(Isa::load_part(row + k, length - k),
                                       Isa::load_part(x[m] + x_begin + k, length - k), sums[m][0]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int s = 1; s < kSums; ++s) {
        sums[m][0] = Isa::add(sums[m][0], sums[m][s]);
      }
      totals[m][i] = sums[m][0];
    }
  }
  add_totals<Isa, M, N>(totals, out, n);
}

template <typename Isa, int M, int N, bool first, bool lines>
inline void multiply_row_outputs(const typename Isa::Input* const* x, int64_t x_begin, const typename Isa::Weight* w,
                                 int64_t stride, int64_t length, float* const* out, int64_t n) {
  if constexpr (lines) {
    multiply_row_lines<Isa, M, N>(x, x_begin, w, stride, length, out, n);
  } else {
    multiply_row_tile<Isa, M, N, first>(x, x_begin, w, stride, length, out, n);
  }
}

// All outputs begin to end of M rows, for inputs x_begin to x_begin + length.
template <typename Isa, int M, bool first, bool lines>
inline void multiply_row_panel(const RowProduct& p, const typename Isa::Input* const* x, float* const* out,
                               int64_t x_begin, int64_t length, int64_t begin, int64_t end) {
  constexpr int kWide = M <= Isa::kRowTile || lines ? 4 : 3;
  const auto* weights = static_cast<const typename Isa::Weight*>(p.weights) + x_begin;
  int64_t n = begin;
  for (; n + kWide <= end; n += kWide) {
    multiply_row_outputs<Isa, M, kWide, first, lines>(x, x_begin, weights + n * p.stride, p.stride, length, out,
                                                      n - p.begin);
  }
  for (; n < end; ++n) {
    multiply_row_outputs<Isa, M, 1, first, lines>(x, x_begin, weights + n * p.stride, p.stride, length, out,
                                                  n - p.begin);
  }
}

// The panel of rows `row` to `row` + `count`, up to M of them.
template <typename Isa, int M, bool first, bool lines>
inline void multiply_row_block(const RowProduct& p, int64_t row, int64_t count, int64_t x_begin, int64_t length,
                               int64_t begin, int64_t end) {
  if (count == M) {
    const auto* const* x = reinterpret_cast<const typename Isa::Input* const*>(p.x) + row;
    multiply_row_panel<Isa, M, first, lines>(p, x, p.out + row, x_begin, length, begin, end);
  } else if constexpr (M > 1) {
    multiply_row_block<Isa, M - 1, first, lines>(p, row, count, x_begin, length, begin, end);
  }
}

// Outputs from first_output on. The first rows, as many as registers allow, read W from memory, and the rest of them in
// tiles of nearly the same size from the cache.
template <typename Isa, bool lines, int64_t kBlockBytes>
inline void multiply_row_panels(const RowProduct& p, int64_t first_output) {
  constexpr int64_t kBlock = kBlockBytes / static_cast<int64_t>(sizeof(typename Isa::Input));
  const int64_t first = p.num_rows < Isa::kFirstRows ? p.num_rows : Isa::kFirstRows, rest = p.num_rows - first;
  const int64_t num_tiles = (rest + Isa::kRowTile - 1) / Isa::kRowTile;
  const int64_t panel = rest == 0 ? tuning::kFewRowPanel : tuning::kRowPanel;
  for (int64_t begin = first_output; begin < p.end; begin += panel) {
    const int64_t end = begin + panel < p.end ? begin + panel : p.end;
    for (int64_t k = 0; k < p.num_inputs; k += kBlock) {
      const int64_t length = k + kBlock < p.num_inputs ? kBlock : p.num_inputs - k;
      multiply_row_block<Isa, Isa::kFirstRows, true, lines>(p, 0, first, k, length, begin, end);
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        const int64_t row = tile * rest / num_tiles, row_end = (tile + 1) * rest / num_tiles;
        multiply_row_block<Isa, Isa::kRowTile, false, false>(p, first + row, row_end - row, k, length, begin, end);
      }
    }
  }
}

// As many rows of x as there may be.
template <typename Isa>
inline void multiply_row_panels(const RowProduct& p, int64_t first_output) {
  if constexpr (Isa::kLineRows > 0) {
    const int64_t row_bytes = p.num_inputs * static_cast<int64_t>(sizeof(typename Isa::Weight));
    const bool lines =
        p.num_rows <= Isa::kLineRows || (p.num_rows <= Isa::kFirstRows && row_bytes <= tuning::kShortRowBytes);
    if (lines) {
      return multiply_row_panels<Isa, true, tuning::kLineBlockBytes>(p, first_output);
    }
  }
  multiply_row_panels<Isa, false, tuning::kRowBlockBytes>(p, first_output);
}

template <typename Isa>
inline const typename Isa::Weight* channel_of(const ChannelProduct& p, int64_t j) {
  const int64_t channel = p.channels == nullptr ? j : p.channels[j];
  return static_cast<const typename Isa::Weight*>(p.weights) + channel * p.stride;
}

// Two vectors of outputs of kRows rows.
template <typename Isa, int kCount, int kRows, bool whole>
inline void add_channels(const ChannelProduct& p, int64_t j, int64_t m, int64_t n, const typename Isa::Operand* low,
                         const typename Isa::Operand* high) {
  typename Isa::Vector first[kRows], second[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const float* out = p.out[m + i] + (n - p.begin);
    first[i] = Isa::load_floats(out);
    second[i] = Isa::load_floats(out + Isa::kLanes);
  }
#pragma GCC unroll 8
  for (int s = 0; s < kCount; ++s) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const auto* x = static_cast<const typename Isa::Input*>(p.x[m + i]) + j;
      const typename Isa::Operand input = Isa::template broadcast<whole>(x + s * Isa::kDepth);
      first[i] = Isa::multiply_add(low[s], input, first[i]);
      second[i] = Isa::multiply_add(high[s], input, second[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    float* out = p.out[m + i] + (n - p.begin);
    Isa::store_sums(out, first[i]);
    Isa::store_sums(out + Isa::kLanes, second[i]);
  }
}

// Outputs begin to end, a multiple of two vectors, of kCount steps of channels from j on: their weights stay in
// registers while the rows of x pass by. `whole` is false where the last step lacks its last channel; `few` rows of x
// leave time to call for the same channels ahead, which hardware then goes on with.
template <typename Isa, int kCount, bool whole, bool few>
inline void multiply_channel_group(const ChannelProduct& p, int64_t j, int64_t begin, int64_t end) {
  using Weight = typename Isa::Weight;
  constexpr int kRows = Isa::kChannelRows;
  const Weight* source[kCount][Isa::kDepth];
  const Weight* next[kCount][Isa::kDepth];  // the group after this one
  for (int s = 0; s < kCount; ++s) {
    for (int d = 0; d < Isa::kDepth; ++d) {
      const int64_t channel = j + s * Isa::kDepth + d;
      source[s][d] = whole || d == 0 ? channel_of<Isa>(p, channel) : nullptr;
      const int64_t after = channel + kCount * Isa::kDepth;
      next[s][d] = channel_of<Isa>(p, after < p.num_inputs ? after : p.num_inputs - 1);
    }
  }
  constexpr int64_t kAhead = tuning::kChannelAheadBytes / static_cast<int64_t>(sizeof(Weight));
  for (int64_t n = begin; n < end; n += 2 * Isa::kLanes) {
    typename Isa::Operand low[kCount], high[kCount];
#pragma GCC unroll 8
    for (int s = 0; s < kCount; ++s) {
      Isa::template load_channels<whole>(source[s], n, low[s], high[s]);
      for (int d = 0; d < Isa::kDepth; ++d) {
        if constexpr (few) {
          const bool same = n + kAhead < end && (whole || d == 0);
          __builtin_prefetch(same ? source[s][d] + n + kAhead : next[s][d] + (begin + n + kAhead - end));
        } else {
          __builtin_prefetch(next[s][d] + n);
        }
      }
    }
    int64_t m = 0;
    for (; m + kRows <= p.num_rows; m += kRows) {
      add_channels<Isa, kCount, kRows, whole>(p, j, m, n, low, high);
    }
    for (; m < p.num_rows; ++m) {
      add_channels<Isa, kCount, 1, whole>(p, j, m, n, low, high);
    }
  }
}

// Outputs from first_output to p.end: what is left of a matrix whose outputs are no multiple of two vectors.
template <typename Isa>
inline void multiply_channel_rest(const ChannelProduct& p, int64_t first_output) {
  for (int64_t j = 0; first_output < p.end && j < p.num_inputs; ++j) {
    const auto* weights = channel_of<Isa>(p, j);
    for (int64_t m = 0; m < p.num_rows; ++m) {
      const float input = to_float(static_cast<const typename Isa::Input*>(p.x[m])[j]);
      for (int64_t n = first_output; n < p.end; ++n) {
        p.out[m][n - p.begin] += input * to_float(weights[n]);
      }
    }
  }
}

// Weights pass through registers, and the sums of a strip of outputs stay in the cache.
template <typename Isa, bool few>
inline void multiply_channel_strips(const ChannelProduct& p) {
  constexpr int64_t kGroup = int64_t{Isa::kSteps} * Isa::kDepth;
  constexpr int64_t kChunk = 2 * Isa::kLanes;
  int64_t strip = tuning::kStripBytes / static_cast<int64_t>(sizeof(float)) / p.num_rows / kOutputStep * kOutputStep;
  strip = strip < tuning::kStripMin ? tuning::kStripMin : strip;
  const int64_t whole_end = p.begin + (p.end - p.begin) / kChunk * kChunk;
  for (int64_t begin = p.begin; begin < whole_end; begin += strip) {
    const int64_t end = begin + strip < whole_end ? begin + strip : whole_end;
    int64_t j = 0;
    for (; j + kGroup <= p.num_inputs; j += kGroup) {
      multiply_channel_group<Isa, Isa::kSteps, true, few>(p, j, begin, end);
    }
    for (; j + Isa::kDepth <= p.num_inputs; j += Isa::kDepth) {
      multiply_channel_group<Isa, 1, true, few>(p, j, begin, end);
    }
    if (j < p.num_inputs) {
      multiply_channel_group<Isa, 1, false, few>(p, j, begin, end);
    }
  }
  multiply_channel_rest<Isa>(p, whole_end);
}

}  // namespace
}  // namespace d2moe::kernels
