// Products of many rows of x: weights are packed, block by block, as multiplications take them. Part of
// product_loops.h.
namespace d2moe::kernels {
namespace {

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
        const auto* rows =
            static_cast<const typename Isa::Weight*>(p.weights) + (begin + c * kChunk + half * Isa::kLanes) * p.stride;
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
    first[i] = Isa::load_floats(out);
    second[i] = Isa::load_floats(out + Isa::kLanes);
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

}  // namespace
}  // namespace d2moe::kernels
