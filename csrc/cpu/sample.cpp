// sample: from logits to tokens; sample_math.h defines the result, bit for bit.
//
// Threads    Rows where there are many; else chunks of one row, in one pass over them after
//            another.
// Passes     The scaled logits in float32 and the largest; the levels; with top-k, the counts of
//            the levels' bins (2 passes as a rule, 4 at most). The tokens that are left are then
//            packed together with their weights, and top-p and the draw look at those alone.
// Traffic    logits and seen once, 24 bytes of scratch per token, from L2 after the first pass.
#include "../sample.h"

#include "../sample_math.h"
#include "common/dtypes.h"
#include "common/scratch.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

constexpr int64_t kChunk = 8192;  // tokens of one task
constexpr int64_t kManyRows = 8;  // from here on a row is one thread's

MLLAMA_INLINE FVec load_float(const double* p, Whole part) {
  return __builtin_convertvector(load(p, part), FVec);
}
MLLAMA_INLINE FVec load_float(const double* p, First part) {
  return __builtin_convertvector(load(p, part), FVec);
}
template <typename T, typename Part>
MLLAMA_INLINE FVec load_float(const T* p, Part part) {
  return load(p, part);
}

// What one task knows of its chunk.
struct Chunk {
  float largest;
  bool has_nan;
  int64_t packed;  // tokens kept together at the chunk's place in the arrays
  int64_t mass;    // of those that may be drawn
  int64_t bins[kBins];
};

struct Row {
  float* scaled;     // (vocab,)
  uint32_t* levels;  // (vocab,), packed chunk by chunk
  int32_t* tokens;   // which token a packed level belongs to
  int64_t* weights;  // of the packed levels
  Chunk* chunks;
  int64_t vocab;

  int64_t count() const { return ceil_div(vocab, kChunk); }

  template <typename F>
  void for_chunks(const F& f) const {
    parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        f(chunks[i], i * kChunk, min(kChunk, vocab - i * kChunk));
    });
  }
};

// Penalty and temperature; the chunk's largest.
template <typename T>
void scale(const SampleParams& p, int64_t row, float temperature, float* out, int64_t begin,
           int64_t size, Chunk& chunk) {
  const T* logits = static_cast<const T*>(p.logits) + row * p.logits_row_stride + begin;
  const bool* seen = p.seen ? p.seen + row * p.vocab + begin : nullptr;
  FVec largest = splat(-__builtin_inff());
  IVec nans = {};
  for_vectors(size, [&](int64_t i, auto part) {
    FVec z = load_float(logits + i, part);
    const int64_t n = min<int64_t>(kLanes, size - i);
    if (seen) {
      IVec mask = {};
      for (int64_t lane = 0; lane < n; ++lane) mask[lane] = -(int)seen[i + lane];
      const FVec penalized = z < 0.0f ? z * p.repetition_penalty : z / p.repetition_penalty;
      z = mask ? penalized : z;
    }
    if (temperature != 1) z /= temperature;
    for (int64_t lane = n; lane < kLanes; ++lane) z[lane] = -__builtin_inff();
    nans |= z != z;
    largest = max_vec(z, largest);
    store(out + i, z, part);
  });
  chunk.largest = max_lanes(largest);
  chunk.has_nan = false;
  for (int lane = 0; lane < kLanes; ++lane) chunk.has_nan |= nans[lane] != 0;
}

void find_levels(const float* scaled, float largest, uint32_t* levels, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const float distance = largest - scaled[i];
    const float cut = distance < kMaxDistance ? distance : kMaxDistance;
    levels[i] = static_cast<uint32_t>(static_cast<int32_t>(cut * kLevelsPerUnit));
  }
}

void find_weights(const uint32_t* levels, int64_t* weights, int64_t size) {
  for (int64_t i = 0; i < size; ++i) weights[i] = weight_of(levels[i]);
}

// The bin in which the amount from the most likely token on reaches `need`; kBins: none does.
// Adds the amounts before it to `above`.
int find_bin(const Row& row, int64_t need, int64_t& above, int64_t& in_bin) {
  for (int bin = 0; bin < kBins; ++bin) {
    in_bin = 0;
    for (int64_t i = 0; i < row.count(); ++i) in_bin += row.chunks[i].bins[bin];
    if (above + in_bin >= need) return bin;
    above += in_bin;
  }
  return kBins;
}

template <bool kMass>
void fill_bins(Chunk& chunk, const CutInterval& interval, const uint32_t* levels,
               const int64_t* weights, int64_t size) {
  memset(chunk.bins, 0, sizeof(chunk.bins));
  for (int64_t i = 0; i < size; ++i) {
    if (interval.contains(levels[i])) chunk.bins[interval.bin(levels[i])] += kMass ? weights[i] : 1;
  }
}

// The largest level of a token that has less than `need` above it: less mass, or fewer tokens.
template <bool kMass>
uint32_t find_cut(const Row& row, int64_t need, bool packed) {
  CutInterval interval;
  int64_t above = 0, in_bin = 0;
  for (;;) {
    row.for_chunks([&](Chunk& chunk, int64_t begin, int64_t size) {
      fill_bins<kMass>(chunk, interval, row.levels + begin, row.weights + begin,
                       packed ? chunk.packed : size);
    });
    const int bin = find_bin(row, need, above, in_bin);
    if (bin == kBins) return kMaxLevel;
    const uint32_t last = interval.last_level(bin);
    if (interval.keeps_bin(above + in_bin, kMass ? weight_of(last) : 1, need)) return last;
    interval.enter(bin);
  }
}

// Keeps the levels up to `cut` that have a weight.
void pack(const Row& row, uint32_t cut) {
  cut = min(cut, kMaxLevel - 1);
  row.for_chunks([&](Chunk& chunk, int64_t begin, int64_t size) {
    uint32_t* levels = row.levels + begin;
    int64_t packed = 0;
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t level = levels[i];
      levels[packed] = level;
      row.tokens[begin + packed] = (int32_t)(begin + i);
      packed += level <= cut;
    }
    chunk.packed = packed;
    find_weights(levels, row.weights + begin, packed);
  });
}

// The mass of the packed tokens that stay, of each chunk and of all.
struct Filter {
  uint32_t cut;
  int64_t min_weight;

  int64_t operator()(uint32_t level, int64_t weight) const {
    return level <= cut && weight >= min_weight ? weight : 0;
  }
};

int64_t find_mass(const Row& row, const Filter& filter) {
  row.for_chunks([&](Chunk& chunk, int64_t begin, int64_t) {
    const uint32_t* levels = row.levels + begin;
    const int64_t* weights = row.weights + begin;
    int64_t mass = 0;
    for (int64_t i = 0; i < chunk.packed; ++i) mass += filter(levels[i], weights[i]);
    chunk.mass = mass;
  });
  int64_t total = 0;
  for (int64_t i = 0; i < row.count(); ++i) total += row.chunks[i].mass;
  return total;
}

int64_t draw(const SampleParams& p, const Row& row, int64_t index, const Filter& filter) {
  const auto weight = [&](int64_t i) { return filter(row.levels[i], row.weights[i]); };
  const int64_t total = find_mass(row, filter);
  int64_t left = draw_target(p.seeds[index], *p.step, total);
  int64_t c = 0;
  for (; left >= row.chunks[c].mass; ++c) left -= row.chunks[c].mass;
  int64_t i = c * kChunk;
  for (; left >= weight(i); ++i) left -= weight(i);
  return row.tokens[i];
}

template <typename T>
int64_t sample_row(const SampleParams& p, const Row& row, int64_t index) {
  row.for_chunks([&](Chunk& chunk, int64_t begin, int64_t size) {
    scale<T>(p, index, p.do_sample ? p.temperature : 1.0f, row.scaled + begin, begin, size, chunk);
  });
  float largest = -__builtin_inff();
  bool has_nan = false;
  for (int64_t i = 0; i < row.count(); ++i) {
    largest = max(largest, row.chunks[i].largest);
    has_nan |= row.chunks[i].has_nan;
  }
  if (has_nan || __builtin_isinf(largest)) return kInvalidToken;
  if (!p.do_sample) {
    int64_t token = 0;
    while (row.chunks[token / kChunk].largest != largest) token += kChunk;
    while (row.scaled[token] != largest) ++token;
    return token;
  }
  row.for_chunks([&](Chunk&, int64_t begin, int64_t size) {
    find_levels(row.scaled + begin, largest, row.levels + begin, size);
  });
  pack(row, p.top_k > 0 ? find_cut<false>(row, p.top_k, false) : kMaxLevel);
  uint32_t cut = kMaxLevel;
  if (p.drop_share > 0) {
    const int64_t total = find_mass(row, {kMaxLevel, 1});
    cut = find_cut<true>(row, mass_to_keep(total, p.drop_share), true);
  }
  return draw(p, row, index, {cut, p.min_weight});
}

template <typename T>
void sample_rows(const SampleParams& p, int64_t begin, int64_t end) {
  Scratch scratch;
  Row row;
  row.vocab = p.vocab;
  row.scaled = scratch.take<float>(p.vocab);
  row.levels = scratch.take<uint32_t>(p.vocab);
  row.tokens = scratch.take<int32_t>(p.vocab);
  row.weights = scratch.take<int64_t>(p.vocab);
  row.chunks = scratch.take<Chunk>(row.count());
  for (int64_t i = begin; i < end; ++i) p.tokens[i] = sample_row<T>(p, row, i);
}

template <typename T>
void run(const SampleParams& p) {
  if (p.rows < kManyRows) return sample_rows<T>(p, 0, p.rows);
  // Within a task the loops over chunks stay on its thread.
  parallel_for(0, p.rows, 1, [&](int64_t begin, int64_t end) { sample_rows<T>(p, begin, end); });
}

}  // namespace

void sample(const SampleParams& p) {
  with_dtype(p.dtype, [&]<typename T>(Type<T>) { run<T>(p); });
}

}  // namespace mllama::MLLAMA_ISA
