// The loops of product_kernels.h over the vectors of an instruction set. No include guard and no #include: a file that
// switches an instruction set on includes this below the switch, once, and everything here is that file's own.
//
// Isa says what a vector is:
//   Weight, Input          elements of W and of x
//   Vector                 float32 sums, kLanes of them
//   Operand                what a multiplication takes: kDepth inputs of each of kLanes outputs (by channel), or
//                          kDepth * kLanes inputs of one (by row)
//   kRowTile               rows of x that a row product takes at a time; kSteps: loads of channels held in registers
namespace d2moe::kernels {
namespace {

// `first` tells the rows of x that read these weights first, from memory: they call for the next tile's ahead of time.
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
  int64_t k = 0;
  for (; k + kStep <= length; k += kStep) {
    typename Isa::Operand weights[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      weights[i] = Isa::load(w + i * stride + k);
      if constexpr (first) {
        __builtin_prefetch(w + (i + N) * stride + k);
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
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    Isa::template add_totals<N>(sums[m], out[m] + n);
  }
}

// All outputs begin to end of M rows, for inputs x_begin to x_begin + length.
template <typename Isa, int M, bool first>
inline void multiply_row_panel(const RowProduct& p, const typename Isa::Input* const* x, float* const* out,
                               int64_t x_begin, int64_t length, int64_t begin, int64_t end) {
  constexpr int kWide = M <= Isa::kWideRows ? 8 : 4;
  const auto* weights = static_cast<const typename Isa::Weight*>(p.weights) + x_begin;
  int64_t n = begin;
  for (; n + kWide <= end; n += kWide) {
    multiply_row_tile<Isa, M, kWide, first>(x, x_begin, weights + n * p.stride, p.stride, length, out, n - p.begin);
  }
  for (; n < end; ++n) {
    multiply_row_tile<Isa, M, 1, false>(x, x_begin, weights + n * p.stride, p.stride, length, out, n - p.begin);
  }
}

template <typename Isa, bool first>
inline void multiply_row_block(const RowProduct& p, int64_t row, int64_t x_begin, int64_t length, int64_t begin,
                               int64_t end) {
  const auto* const* x = reinterpret_cast<const typename Isa::Input* const*>(p.x) + row;
  float* const* out = p.out + row;
  const int64_t rows = p.num_rows - row < Isa::kRowTile ? p.num_rows - row : Isa::kRowTile;
  switch (rows) {
    case 1:
      return multiply_row_panel<Isa, 1, first>(p, x, out, x_begin, length, begin, end);
    case 2:
      return multiply_row_panel<Isa, 2, first>(p, x, out, x_begin, length, begin, end);
    case 3:
      return multiply_row_panel<Isa, 3, first>(p, x, out, x_begin, length, begin, end);
    case 4:
      return multiply_row_panel<Isa, 4, first>(p, x, out, x_begin, length, begin, end);
    case 5:
      return multiply_row_panel<Isa, 5, first>(p, x, out, x_begin, length, begin, end);
    default:
      return multiply_row_panel<Isa, 6, first>(p, x, out, x_begin, length, begin, end);
  }
}

template <typename Isa>
inline void multiply_row_panels(const RowProduct& p) {
  constexpr int64_t kBlock = tuning::kRowBlockBytes / static_cast<int64_t>(sizeof(typename Isa::Input));
  // A few rows read W from memory: tile by tile, each to its end, in the order it is stored in. Many stay with a panel.
  const int64_t panel = p.num_rows <= Isa::kRowTile ? 8 : tuning::kRowPanel;
  for (int64_t begin = p.begin; begin < p.end; begin += panel) {
    const int64_t end = begin + panel < p.end ? begin + panel : p.end;
    for (int64_t k = 0; k < p.num_inputs; k += kBlock) {
      const int64_t length = k + kBlock < p.num_inputs ? kBlock : p.num_inputs - k;
      multiply_row_block<Isa, true>(p, 0, k, length, begin, end);
      for (int64_t row = Isa::kRowTile; row < p.num_rows; row += Isa::kRowTile) {
        multiply_row_block<Isa, false>(p, row, k, length, begin, end);
      }
    }
  }
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
    first[i] = Isa::load_sums(out);
    second[i] = Isa::load_sums(out + Isa::kLanes);
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
// registers while the rows of x pass by. `whole` is false where the last step lacks its last channel.
template <typename Isa, int kCount, bool whole>
inline void multiply_channel_group(const ChannelProduct& p, int64_t j, int64_t row_begin, int64_t row_end,
                                   int64_t begin, int64_t end) {
  using Weight = typename Isa::Weight;
  constexpr int kRows = Isa::kChannelRows;
  const Weight* source[kCount][Isa::kDepth];
  const Weight* next[kCount][Isa::kDepth];  // the group after this one, which is called for ahead of time
  for (int s = 0; s < kCount; ++s) {
    for (int d = 0; d < Isa::kDepth; ++d) {
      const int64_t channel = j + s * Isa::kDepth + d;
      source[s][d] = whole || d == 0 ? channel_of<Isa>(p, channel) : nullptr;
      const int64_t after = channel + kCount * Isa::kDepth;
      next[s][d] = channel_of<Isa>(p, after < p.num_inputs ? after : p.num_inputs - 1);
    }
  }
  for (int64_t n = begin; n < end; n += 2 * Isa::kLanes) {
    typename Isa::Operand low[kCount], high[kCount];
#pragma GCC unroll 8
    for (int s = 0; s < kCount; ++s) {
      Isa::template load_channels<whole>(source[s], n, low[s], high[s]);
      for (int d = 0; d < Isa::kDepth; ++d) {
        __builtin_prefetch(next[s][d] + n);
      }
    }
    int64_t m = row_begin;
    for (; m + kRows <= row_end; m += kRows) {
      add_channels<Isa, kCount, kRows, whole>(p, j, m, n, low, high);
    }
    for (; m < row_end; ++m) {
      add_channels<Isa, kCount, 1, whole>(p, j, m, n, low, high);
    }
  }
}

// What is left of a matrix whose outputs are no multiple of two vectors.
template <typename Isa>
inline void multiply_channel_rest(const ChannelProduct& p, int64_t j_begin, int64_t j_end, int64_t row_begin,
                                  int64_t row_end, int64_t begin, int64_t end) {
  for (int64_t j = j_begin; j < j_end; ++j) {
    const auto* weights = channel_of<Isa>(p, j);
    for (int64_t m = row_begin; m < row_end; ++m) {
      const float input = to_float(static_cast<const typename Isa::Input*>(p.x[m])[j]);
      for (int64_t n = begin; n < end; ++n) {
        p.out[m][n - p.begin] += input * to_float(weights[n]);
      }
    }
  }
}

template <typename Isa>
inline void multiply_channel_block(const ChannelProduct& p, int64_t j_begin, int64_t j_end, int64_t row_begin,
                                   int64_t row_end, int64_t begin, int64_t end) {
  constexpr int64_t kGroup = int64_t{Isa::kSteps} * Isa::kDepth;
  const int64_t whole_end = begin + (end - begin) / (2 * Isa::kLanes) * (2 * Isa::kLanes);
  int64_t j = j_begin;
  for (; j + kGroup <= j_end; j += kGroup) {
    multiply_channel_group<Isa, Isa::kSteps, true>(p, j, row_begin, row_end, begin, whole_end);
  }
  for (; j + Isa::kDepth <= j_end; j += Isa::kDepth) {
    multiply_channel_group<Isa, 1, true>(p, j, row_begin, row_end, begin, whole_end);
  }
  if (j < j_end) {
    multiply_channel_group<Isa, 1, false>(p, j, row_begin, row_end, begin, whole_end);
  }
  multiply_channel_rest<Isa>(p, j_begin, j_end, row_begin, row_end, whole_end, end);
}

// Few rows of x: weights pass through registers, and the sums of a strip of outputs stay in the cache.
template <typename Isa>
inline void multiply_channels_of_few_rows(const ChannelProduct& p) {
  int64_t strip = tuning::kStripBytes / static_cast<int64_t>(sizeof(float)) / p.num_rows / kOutputStep * kOutputStep;
  strip = strip < tuning::kStripMin ? tuning::kStripMin : strip;
  for (int64_t begin = p.begin; begin < p.end; begin += strip) {
    const int64_t end = begin + strip < p.end ? begin + strip : p.end;
    multiply_channel_block<Isa>(p, 0, p.num_inputs, 0, p.num_rows, begin, end);
  }
}

// A block of weights as a multiplication takes them, chunk by chunk of two vectors of outputs, and step by step in it.
template <typename Isa>
struct PackedWeights {
  static constexpr int64_t kChunk = 2 * Isa::kLanes;
  typename Isa::Operand operands[tuning::kPackedOutputs / kChunk][tuning::kPackedSteps][2];

  // Outputs begin to begin + num_chunks * kChunk of channels j_begin to j_end.
  void pack(const ChannelProduct& p, int64_t j_begin, int64_t j_end, int64_t begin, int64_t num_chunks) {
    for (int64_t j = j_begin; j < j_end; j += Isa::kDepth) {
      const bool whole = j + Isa::kDepth <= j_end;
      const typename Isa::Weight* source[Isa::kDepth] = {};
      for (int d = 0; d < (whole ? Isa::kDepth : 1); ++d) {
        source[d] = channel_of<Isa>(p, j + d);
      }
      const int64_t step = (j - j_begin) / Isa::kDepth;
      for (int64_t c = 0; c < num_chunks; ++c) {
        typename Isa::Operand* pair = operands[c][step];
        if (whole) {
          Isa::template load_channels<true>(source, begin + c * kChunk, pair[0], pair[1]);
        } else {
          Isa::template load_channels<false>(source, begin + c * kChunk, pair[0], pair[1]);
        }
      }
    }
  }

  // The same of weights by row, which are turned around as they are packed: square tiles of kLanes rows and steps.
  void pack(const RowProduct& p, int64_t k_begin, int64_t k_end, int64_t begin, int64_t num_chunks) {
    constexpr int64_t kTile = int64_t{Isa::kLanes} * Isa::kDepth;
    for (int64_t c = 0; c < num_chunks; ++c) {
      for (int half = 0; half < 2; ++half) {
        const auto* rows = static_cast<const typename Isa::Weight*>(p.weights) +
                           (begin + c * kChunk + half * Isa::kLanes) * p.stride;
        for (int64_t k = k_begin; k < k_end; k += kTile) {
          const int64_t count = k + kTile < k_end ? kTile : k_end - k;
          typename Isa::Operand tile[Isa::kLanes];
#pragma GCC unroll 16
          for (int i = 0; i < Isa::kLanes; ++i) {
            const auto* source = rows + i * p.stride + k;
            tile[i] = count == kTile ? Isa::load(source) : Isa::load_part(source, count);
          }
          Isa::transpose(tile);
          const int64_t step = (k - k_begin) / Isa::kDepth;
#pragma GCC unroll 16
          for (int i = 0; i < Isa::kLanes; ++i) {
            operands[c][step + i][half] = tile[i];
          }
        }
      }
    }
  }
};

// Where the next block of weights stands in memory: it is called for line by line while this one is multiplied, as
// multiplications would otherwise wait for it.
struct NextBlock {
  const char* memory;
  int64_t stride;           // bytes from one row, or channel, to the next
  const int32_t* channels;  // which ones; nullptr: one after the other
  int64_t num_rows, row_bytes;
  int64_t row = 0, byte = 0;  // the next line

  void call(int64_t num_lines) {
    constexpr int64_t kLine = 64;
    for (; row_bytes > 0 && num_lines > 0 && row < num_rows; --num_lines) {
      const int64_t offset = channels == nullptr ? row * stride : channels[row] * stride;
      __builtin_prefetch(memory + offset + byte, 0, 2);
      byte += kLine;
      if (byte >= row_bytes) {
        byte = 0;
        ++row;
      }
    }
  }
};

template <typename Isa>
inline NextBlock next_block(const ChannelProduct& p, int64_t j_begin, int64_t j_end, int64_t begin, int64_t end) {
  constexpr int64_t kSize = sizeof(typename Isa::Weight);
  const char* memory = static_cast<const char*>(p.weights) + begin * kSize;
  const int32_t* channels = p.channels == nullptr ? nullptr : p.channels + j_begin;
  return {channels == nullptr ? memory + j_begin * p.stride * kSize : memory, p.stride * kSize, channels,
          j_end - j_begin, (end - begin) * kSize};
}

template <typename Isa>
inline NextBlock next_block(const RowProduct& p, int64_t k_begin, int64_t k_end, int64_t begin, int64_t end) {
  constexpr int64_t kSize = sizeof(typename Isa::Weight);
  return {static_cast<const char*>(p.weights) + (begin * p.stride + k_begin) * kSize, p.stride * kSize, nullptr,
          end - begin, (k_end - k_begin) * kSize};
}

template <typename Isa, int kRows, typename Product>
inline void multiply_packed_tile(const Product& p, const typename Isa::Operand (*operands)[2], int64_t j_begin,
                                 int64_t j_end, int64_t m, int64_t n) {
  typename Isa::Vector first[kRows], second[kRows];
  const typename Isa::Input* x[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const float* out = p.out[m + i] + (n - p.begin);
    x[i] = static_cast<const typename Isa::Input*>(p.x[m + i]) + j_begin;
    first[i] = Isa::load_sums(out);
    second[i] = Isa::load_sums(out + Isa::kLanes);
  }
  const int64_t num_steps = (j_end - j_begin) / Isa::kDepth;
  for (int64_t s = 0; s < num_steps; ++s) {
    const typename Isa::Operand low = operands[s][0], high = operands[s][1];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const typename Isa::Operand input = Isa::template broadcast<true>(x[i] + s * Isa::kDepth);
      first[i] = Isa::multiply_add(low, input, first[i]);
      second[i] = Isa::multiply_add(high, input, second[i]);
    }
  }
  if (num_steps * Isa::kDepth < j_end - j_begin) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const typename Isa::Operand input = Isa::template broadcast<false>(x[i] + num_steps * Isa::kDepth);
      first[i] = Isa::multiply_add(operands[num_steps][0], input, first[i]);
      second[i] = Isa::multiply_add(operands[num_steps][1], input, second[i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    float* out = p.out[m + i] + (n - p.begin);
    Isa::store_sums(out, first[i]);
    Isa::store_sums(out + Isa::kLanes, second[i]);
  }
}

// The tile of `rows` rows, up to kRows of them.
template <typename Isa, int kRows, typename Product>
inline void multiply_packed_rows(int64_t rows, const Product& p, const typename Isa::Operand (*operands)[2],
                                 int64_t j_begin, int64_t j_end, int64_t m, int64_t n) {
  if (rows == kRows) {
    multiply_packed_tile<Isa, kRows>(p, operands, j_begin, j_end, m, n);
  } else if constexpr (kRows > 1) {
    multiply_packed_rows<Isa, kRows - 1>(rows, p, operands, j_begin, j_end, m, n);
  }
}

// Many rows of x: a block of weights is packed once, and each tile of rows keeps its sums in registers. Computes the
// outputs from p.begin to where they are no multiple of two vectors, which is returned.
template <typename Isa, typename Product>
inline int64_t multiply_packed(const Product& p) {
  static thread_local PackedWeights<Isa> packed;
  constexpr int64_t kBlock = tuning::kPackedSteps * Isa::kDepth;
  constexpr int64_t kStrip = tuning::kPackedOutputs;
  constexpr int64_t kChunk = PackedWeights<Isa>::kChunk;
  const auto end_of = [](int64_t begin, int64_t step, int64_t limit) {
    return begin + step < limit ? begin + step : limit;
  };
  // Tiles of nearly the same number of rows: a small last one would take almost the time of a large one.
  const int64_t num_tiles = (p.num_rows + Isa::kPackedRows - 1) / Isa::kPackedRows;
  const int64_t whole_end = p.begin + (p.end - p.begin) / kChunk * kChunk;
  for (int64_t begin = p.begin; begin < whole_end; begin += kStrip) {
    const int64_t end = end_of(begin, kStrip, whole_end);
    for (int64_t j = 0; j < p.num_inputs; j += kBlock) {
      const int64_t j_end = end_of(j, kBlock, p.num_inputs);
      packed.pack(p, j, j_end, begin, (end - begin) / kChunk);
      const bool last = j_end == p.num_inputs;
      const int64_t next_j = last ? 0 : j_end, next_begin = last ? end : begin;
      NextBlock next = next_block<Isa>(p, next_j, end_of(next_j, kBlock, p.num_inputs), next_begin,
                                       end_of(next_begin, kStrip, whole_end));
      const int64_t share = next.num_rows * (next.row_bytes / 64 + 1) / (num_tiles * ((end - begin) / kChunk)) + 1;
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        const int64_t m = tile * p.num_rows / num_tiles, m_end = (tile + 1) * p.num_rows / num_tiles;
        for (int64_t n = begin; n < end; n += kChunk) {
          next.call(share);
          multiply_packed_rows<Isa, Isa::kPackedRows>(m_end - m, p, packed.operands[(n - begin) / kChunk], j, j_end, m,
                                                      n);
        }
      }
    }
  }
  return whole_end;
}

template <typename Isa>
void multiply_rows(const RowProduct& p) {
  if (p.num_rows >= Isa::kManyRowsByRow) {
    RowProduct rest = p;
    rest.begin = multiply_packed<Isa>(p);
    if (rest.begin < p.end) {
      float* out[tuning::kRowPanel];
      for (int64_t row = 0; row < p.num_rows; row += tuning::kRowPanel) {
        rest.x = p.x + row;
        rest.num_rows = p.num_rows - row < tuning::kRowPanel ? p.num_rows - row : tuning::kRowPanel;
        for (int64_t m = 0; m < rest.num_rows; ++m) {
          out[m] = p.out[row + m] + (rest.begin - p.begin);
        }
        rest.out = out;
        multiply_row_panels<Isa>(rest);
      }
    }
  } else if (p.num_rows > 0) {
    multiply_row_panels<Isa>(p);
  }
}

// Either way an output's products are added in the order of the channels, step by step.
template <typename Isa>
void multiply_channels(const ChannelProduct& p) {
  if constexpr (Isa::kManyRows == INT64_MAX) {
    multiply_channels_of_few_rows<Isa>(p);
  } else if (p.num_rows >= Isa::kManyRows) {
    const int64_t rest = multiply_packed<Isa>(p);
    multiply_channel_rest<Isa>(p, 0, p.num_inputs, 0, p.num_rows, rest, p.end);
  } else if (p.num_rows > 0) {
    multiply_channels_of_few_rows<Isa>(p);
  }
}

template <typename Isa>
ProductKernels kernels_of(const char* instruction_set, ElementType input_type) {
  return {instruction_set, input_type, &multiply_rows<Isa>, &multiply_channels<Isa>};
}

}  // namespace
}  // namespace d2moe::kernels
