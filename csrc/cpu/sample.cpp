// sample: from logits to tokens; sample_math.h defines the result, bit for bit.
//
// Threads    Rows where there are many; else chunks of one row, in one pass over them after
//            another.
// Passes     The scaled logits in float32 and the largest; the levels; with top-k, the counts of
//            the levels' bins (2 passes as a rule, 4 at most). The tokens that are left are then
//            packed together with their weights, and top-p and the draw look at those alone.
//            Log-probabilities: two more over the logits, for the likeliest and for the sum.
// Traffic    What the row asks for once, of logits (2 or 4 bytes a token), seen (1), counts (4)
//            and allowed (1/8); 24 bytes of scratch per token, from L2 after the first pass.
#include "common/scratch.h"
#include "ops.h"
#include "sample_logprobs.h"
#include "sample_scale.h"
#include "sample_weights.h"

namespace mllama::MLLAMA_ISA {
namespace {

constexpr int64_t kManyRows = 8;  // from here on a row is one thread's

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
  int64_t left = draw_target(p.seeds[index], p.steps[index], total);
  int64_t c = 0;
  for (; left >= row.chunks[c].mass; ++c) left -= row.chunks[c].mass;
  int64_t i = c * kChunk;
  for (; left >= weight(i); ++i) left -= weight(i);
  return row.tokens[i];
}

template <typename T>
int64_t choose_token(const SampleParams& p, const Row& row, int64_t index) {
  const ScaleOptions options = scale_options(p, index);
  const auto own = [&](const auto* numbers) { return numbers ? numbers + index : nullptr; };
  const FilterOptions filters =
      filter_options(own(p.top_k), own(p.top_p), own(p.min_p), own(p.num_likeliest));
  if (!options.are_valid || !filters.are_valid) return kInvalidToken;
  row.for_chunks([&](Chunk& chunk, int64_t begin, int64_t size) {
    float* out = options.is_greedy ? nullptr : row.scaled + begin;
    scale<T>(p, options, index, begin, out, size, chunk);
  });
  float largest = -__builtin_inff();
  bool has_nan = false;
  for (int64_t i = 0; i < row.count(); ++i) {
    largest = max(largest, row.chunks[i].largest);
    has_nan |= row.chunks[i].has_nan;
  }
  if (has_nan || __builtin_isinf(largest)) return kInvalidToken;
  if (options.is_greedy) {
    int64_t token = 0;
    while (row.chunks[token / kChunk].largest != largest) token += kChunk;
    scale<T>(p, options, index, token, row.scaled + token, min(kChunk, p.vocab - token),
             row.chunks[token / kChunk]);
    while (row.scaled[token] != largest) ++token;
    return token;
  }
  row.for_chunks([&](Chunk&, int64_t begin, int64_t size) {
    find_levels(row.scaled + begin, largest, row.levels + begin, size);
  });
  pack(row, filters.top_k > 0 ? find_cut<false>(row, filters.top_k, false) : kMaxLevel);
  uint32_t cut = kMaxLevel;
  if (filters.drop_share > 0) {
    const int64_t total = find_mass(row, {kMaxLevel, 1});
    cut = find_cut<true>(row, mass_to_keep(total, filters.drop_share), true);
  }
  return draw(p, row, index, {cut, filters.min_weight});
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
  for (int64_t i = begin; i < end; ++i) {
    p.tokens[i] = choose_token<T>(p, row, i);
    if (p.num_likeliest != nullptr) write_logprobs<T>(p, row, i, p.tokens[i]);
  }
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
