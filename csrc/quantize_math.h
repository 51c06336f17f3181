// The searches that define q4_k, q6_k and, with importance, q4_0, the same on both devices: every
// operation is one of IEEE in float32, and sums have one order. Sources that include this are
// compiled without contraction of a product and a sum (setup.py).
//
// Both minimise sum(importance * (x - decoded)^2), given scales of sub-blocks that are themselves
// whole multiples of a half. A sub-block's sums over its codes q say what any scale and offset
// would cost, so that a trial costs one pass over the weights.
//
// Lanes are sub-blocks. `M`, the machine, is what a lane is made of:
//   V                        a value per lane: a vector on the CPU, a float on CUDA
//   kVecs                    values of V that are searched together
//   min, max, round          of lanes; max(NaN, x) need not be x
//   half(V)                  the value after a round trip through float16
//   total<n>, largest<n>     over each n neighbouring lanes, in order, given to all of them
#pragma once

#ifdef __CUDACC__
#define MLLAMA_SEARCH static __device__ __forceinline__
#define MLLAMA_UNROLL _Pragma("unroll")
#else
#define MLLAMA_SEARCH static inline __attribute__((always_inline))
#define MLLAMA_UNROLL
#endif

namespace mllama {
namespace {  // internal linkage: the CPU kernels are compiled once per instruction set (simd.h)

// The weights of a machine's sub-blocks: [i] is the i-th of every lane.
template <typename M, int kSize, bool kWeighted>
struct SubBlocks {
  using V = typename M::V;
  const V (&x)[kSize][M::kVecs];
  const V (&importance)[kWeighted ? kSize : 1][M::kVecs];

  // `importance[i] * v`
  MLLAMA_SEARCH V weigh(const SubBlocks& b, int i, int v, V value) {
    if constexpr (kWeighted) return b.importance[i][v] * value;
    return value;
  }
};

// Sums over a sub-block, each term times the column's importance.
template <typename V>
struct Moments {
  V one, x;
};
template <typename V>
struct CodeSums {
  V q, qq, xq;
};

template <typename M, int kSize, bool kWeighted>
MLLAMA_SEARCH Moments<typename M::V> moments(const SubBlocks<M, kSize, kWeighted>& b, int v) {
  using V = typename M::V;
  Moments<V> sums{V{} + (kWeighted ? 0.0f : static_cast<float>(kSize)), V{}};
  MLLAMA_UNROLL
  for (int i = 0; i < kSize; ++i) {
    if constexpr (kWeighted) sums.one += b.importance[i][v];
    sums.x += b.weigh(b, i, v, b.x[i][v]);
  }
  return sums;
}

template <int kLow, int kHigh, typename M>
MLLAMA_SEARCH typename M::V code(typename M::V scaled) {
  using V = typename M::V;
  return M::round(
      M::min(M::max(scaled, V{} + static_cast<float>(kLow)), V{} + static_cast<float>(kHigh)));
}

// The sums of the codes round((x - offset) * inverse).
template <int kLow, int kHigh, bool kOffset, typename M, int kSize, bool kWeighted>
MLLAMA_SEARCH CodeSums<typename M::V> code_sums(const SubBlocks<M, kSize, kWeighted>& b, int v,
                                                typename M::V inverse, typename M::V offset) {
  using V = typename M::V;
  CodeSums<V> sums{V{}, V{}, V{}};
  MLLAMA_UNROLL
  for (int i = 0; i < kSize; ++i) {
    const V x = b.x[i][v];
    const V q = code<kLow, kHigh, M>((kOffset ? x - offset : x) * inverse);
    const V weighted = b.weigh(b, i, v, q);
    if constexpr (kOffset) sums.q += weighted;
    sums.qq += weighted * q;
    sums.xq += weighted * x;
  }
  return sums;
}

template <typename V>
MLLAMA_SEARCH V inverse_or_zero(V x) {
  return x != 0.0f ? 1.0f / x : V{};
}

// ---- q4_k: x ~ scale * q - minimum, q in 0..15, scale = d * c, minimum = e * m, c and m in 0..63

template <typename V>
struct Line {
  V scale, offset;  // x ~ scale * q + offset, offset <= 0
  V cost;           // without the sum of x^2, which no choice changes
};

// The line through given codes that costs least.
template <typename V>
MLLAMA_SEARCH Line<V> fitted_line(const Moments<V>& m, const CodeSums<V>& s) {
  const V determinant = m.one * s.qq - s.q * s.q;
  V scale = (m.one * s.xq - m.x * s.q) / determinant;
  V offset = (m.x - scale * s.q) / m.one;
  const auto is_line = (determinant > 0.0f) & (offset <= 0.0f);
  scale = is_line ? scale : s.xq * inverse_or_zero(s.qq);
  offset = is_line ? offset : V{};
  return {scale, offset, V{} - (scale * s.xq + offset * m.x)};
}

template <typename V>
MLLAMA_SEARCH void keep_cheaper(Line<V>& best, const Line<V>& other) {
  const auto better = (other.cost < best.cost) & (other.scale >= 0.0f);
  best.scale = better ? other.scale : best.scale;
  best.offset = better ? other.offset : best.offset;
  best.cost = better ? other.cost : best.cost;
}

// A sub-block by itself: the range divided into 15 steps and less, then codes and line in turn.
template <typename M, bool kWeighted>
MLLAMA_SEARCH Line<typename M::V> free_line(const SubBlocks<M, 32, kWeighted>& b, int v,
                                            const Moments<typename M::V>& m) {
  using V = typename M::V;
  constexpr int kTrials = 13, kTurns = 2;
  V lowest{}, highest = b.x[0][v];
  MLLAMA_UNROLL
  for (int i = 0; i < 32; ++i) {
    lowest = M::min(lowest, b.x[i][v]);
    highest = M::max(highest, b.x[i][v]);
  }
  const V per_range = inverse_or_zero(highest - lowest);
  // One value for all, which the trials cannot have: their codes are not all zero.
  const V level = M::min(m.x / m.one, V{});
  Line<V> best{V{}, level, V{} - level * m.x};
  for (int trial = 0; trial < kTrials; ++trial) {
    const V steps = per_range * (13.0f + 0.25f * static_cast<float>(trial));
    keep_cheaper(best, fitted_line(m, code_sums<0, 15, true>(b, v, steps, lowest)));
  }
  for (int turn = 0; turn < kTurns; ++turn) {
    const V inverse = inverse_or_zero(best.scale);
    keep_cheaper(best, fitted_line(m, code_sums<0, 15, true>(b, v, inverse, best.offset)));
  }
  return best;
}

template <typename M>
struct Q4KScales {
  using V = typename M::V;
  V d[M::kVecs], e[M::kVecs];  // halves, one per eight lanes
  V c[M::kVecs], m[M::kVecs];  // whole numbers
};

// Whole multiples c of d and m of e for one sub-block near a given line, and their cost and sums.
template <typename V>
struct Multiples {
  V c, m, cost;
  CodeSums<V> sums;
};

template <typename M, bool kWeighted>
MLLAMA_SEARCH Multiples<typename M::V> nearest_multiples(const SubBlocks<M, 32, kWeighted>& b,
                                                         int v, const Moments<typename M::V>& own,
                                                         typename M::V d, typename M::V e,
                                                         const Line<typename M::V>& line) {
  using V = typename M::V;
  constexpr int kTurns = 2;
  const V first_c = code<0, 63, M>(line.scale * inverse_or_zero(d));
  const V per_e = inverse_or_zero(e);
  const V first_m = code<0, 63, M>((V{} - line.offset) * per_e);
  const V per_one = per_e / own.one;
  Multiples<V> best{V{}, V{}, V{} + 0x1p127f, {V{}, V{}, V{}}};
  for (int step = -2; step <= 2; ++step) {
    const V c = M::min(M::max(first_c + static_cast<float>(step), V{}), V{} + 63.0f);
    const V scale = d * c, inverse = inverse_or_zero(scale);
    V m = first_m;
    for (int turn = 0; turn < kTurns; ++turn) {
      const CodeSums<V> s = code_sums<0, 15, true>(b, v, inverse, V{} - e * m);
      // For these codes the best m; its cost is at least that of the codes it asks for.
      m = code<0, 63, M>((scale * s.q - own.x) * per_one);
      const V minimum = e * m;
      const V cost = scale * (scale * s.qq - 2.0f * s.xq) +
                     minimum * (minimum * own.one + 2.0f * (own.x - scale * s.q));
      const auto better = cost < best.cost;
      best.c = better ? c : best.c;
      best.m = better ? m : best.m;
      best.cost = better ? cost : best.cost;
      best.sums.q = better ? s.q : best.sums.q;
      best.sums.qq = better ? s.qq : best.sums.qq;
      best.sums.xq = better ? s.xq : best.sums.xq;
    }
  }
  return best;
}

// The d and e that suit codes q, multiples c and m best, by a block's sums of c^2 q^2, c m q, m^2,
// c x q and m x.
template <typename V>
MLLAMA_SEARCH void refit(V cc, V cm, V mm, V cx, V mx, V& d, V& e) {
  const V determinant = cc * mm - cm * cm;
  const V new_d = (cx * mm - mx * cm) / determinant;
  const V new_e = (cx * cm - mx * cc) / determinant;
  const auto usable = (determinant > 0.0f) & (new_d > 0.0f) & (new_e >= 0.0f);
  const V only_d = cx * inverse_or_zero(cc);
  d = usable ? new_d : (mm > 0.0f ? d : only_d);
  e = usable ? new_e : (mm > 0.0f ? e : V{});
}

template <typename M, bool kWeighted>
MLLAMA_SEARCH Q4KScales<M> search_q4_k(const SubBlocks<M, 32, kWeighted>& b) {
  using V = typename M::V;
  constexpr int kN = M::kVecs, kSeeds = 2, kTurns = 2, kRounds = kSeeds * kTurns;
  Moments<V> own[kN];
  Line<V> free[kN], line[kN];
  V d[kN], e[kN], best_cost[kN], largest_scale[kN], largest_minimum[kN];
  Q4KScales<M> best;
  for (int v = 0; v < kN; ++v) {
    own[v] = moments(b, v);
    free[v] = free_line(b, v, own[v]);
    largest_scale[v] = free[v].scale;
    largest_minimum[v] = V{} - free[v].offset;
    best_cost[v] = V{} + 0x1p127f;
    best.d[v] = best.e[v] = best.c[v] = best.m[v] = V{};
  }
  M::template largest<8>(largest_scale);
  M::template largest<8>(largest_minimum);
  for (int round = 0; round < kRounds; ++round) {
    Multiples<V> found[kN];
    V cost[kN], cc[kN], cm[kN], mm[kN], cx[kN], mx[kN];
    for (int v = 0; v < kN; ++v) {
      // The largest are to be 63-fold; then 60.5-fold, where other sub-blocks are lucky.
      if (round % kTurns == 0) {
        const float most = 63.0f - 2.5f * static_cast<float>(round / kTurns);
        line[v] = free[v];
        d[v] = largest_scale[v] / most;
        e[v] = largest_minimum[v] / most;
      }
      d[v] = M::half(d[v]);
      e[v] = M::half(e[v]);
      found[v] = nearest_multiples(b, v, own[v], d[v], e[v], line[v]);
      const Multiples<V>& f = found[v];
      cost[v] = f.cost;
      cc[v] = f.c * f.c * f.sums.qq;
      cm[v] = f.c * f.m * f.sums.q;
      mm[v] = f.m * f.m * own[v].one;
      cx[v] = f.c * f.sums.xq;
      mx[v] = f.m * own[v].x;
    }
    M::template total<8>(cost);
    for (int v = 0; v < kN; ++v) {
      const auto better = cost[v] < best_cost[v];
      best_cost[v] = better ? cost[v] : best_cost[v];
      best.d[v] = better ? d[v] : best.d[v];
      best.e[v] = better ? e[v] : best.e[v];
      best.c[v] = better ? found[v].c : best.c[v];
      best.m[v] = better ? found[v].m : best.m[v];
    }
    if (round % kTurns + 1 == kTurns) continue;
    M::template total<8>(cc);
    M::template total<8>(cm);
    M::template total<8>(mm);
    M::template total<8>(cx);
    M::template total<8>(mx);
    for (int v = 0; v < kN; ++v) {
      line[v] = {d[v] * found[v].c, V{} - e[v] * found[v].m, V{}};
      refit(cc[v], cm[v], mm[v], cx[v], mx[v], d[v], e[v]);
    }
  }
  return best;
}

// ---- q6_k: x ~ d * c * q, q in -32..31, c in -128..127; and q4_0: x ~ d * q, q in -8..7

template <typename M, int kSize, bool kWeighted>
MLLAMA_SEARCH typename M::V largest_by_magnitude(const SubBlocks<M, kSize, kWeighted>& b, int v) {
  using V = typename M::V;
  V lowest = b.x[0][v], highest = b.x[0][v];
  MLLAMA_UNROLL
  for (int i = 1; i < kSize; ++i) {
    lowest = M::min(lowest, b.x[i][v]);
    highest = M::max(highest, b.x[i][v]);
  }
  return V{} - lowest > highest ? lowest : highest;
}

template <typename V>
struct Multiple {
  V c, cost, qq, xq;
};

// Tries the whole multiples of d up to `reach` away from `start`.
template <typename M, bool kWeighted>
MLLAMA_SEARCH void try_multiples(const SubBlocks<M, 16, kWeighted>& b, int v, typename M::V d,
                                 typename M::V start, int reach, Multiple<typename M::V>& best) {
  using V = typename M::V;
  for (int step = -reach; step <= reach; ++step) {
    const V c = code<-128, 127, M>(start + static_cast<float>(step));
    const V scale = d * c;
    const CodeSums<V> s = code_sums<-32, 31, false>(b, v, inverse_or_zero(scale), V{});
    const V cost = scale * (scale * s.qq - 2.0f * s.xq);
    const auto better = cost < best.cost;
    best.c = better ? c : best.c;
    best.cost = better ? cost : best.cost;
    best.qq = better ? s.qq : best.qq;
    best.xq = better ? s.xq : best.xq;
  }
}

template <typename M>
struct Q6KScales {
  using V = typename M::V;
  V d[M::kVecs];  // halves, one per 16 lanes
  V c[M::kVecs];  // whole numbers
};

template <typename M, bool kWeighted>
MLLAMA_SEARCH Q6KScales<M> search_q6_k(const SubBlocks<M, 16, kWeighted>& b) {
  using V = typename M::V;
  constexpr int kN = M::kVecs, kRounds = 3, kFirstReach = 10, kReach = 2;
  Multiple<V> found[kN];
  V d[kN], start[kN], best_cost[kN];
  Q6KScales<M> best;
  for (int v = 0; v < kN; ++v) {
    start[v] = largest_by_magnitude(b, v) / -32.0f;
    d[v] = M::max(start[v], V{} - start[v]) + V{};  // of two zeros the positive one
    best_cost[v] = V{} + 0x1p127f;
    best.d[v] = best.c[v] = V{};
  }
  M::template largest<16>(d);
  // The largest scale may grow by 4 %.
  for (int v = 0; v < kN; ++v) d[v] = d[v] / 122.0f;
  for (int round = 0; round < kRounds; ++round) {
    V cost[kN], cc[kN], cx[kN];
    for (int v = 0; v < kN; ++v) {
      d[v] = M::half(d[v]);
      const V per_d = inverse_or_zero(d[v]);
      const V at = start[v] * per_d;
      found[v] = {V{}, V{}, V{}, V{}};
      if (round == 0) {
        try_multiples(b, v, d[v], at, kFirstReach, found[v]);
        // The largest weight at 31 in place of -32.
        try_multiples(b, v, d[v], at * (-32.0f / 31.0f), kFirstReach, found[v]);
      } else {
        try_multiples(b, v, d[v], at, kReach, found[v]);
      }
      cost[v] = found[v].cost;
      cc[v] = found[v].c * found[v].c * found[v].qq;
      cx[v] = found[v].c * found[v].xq;
    }
    M::template total<16>(cost);
    M::template total<16>(cc);
    M::template total<16>(cx);
    for (int v = 0; v < kN; ++v) {
      const auto better = cost[v] < best_cost[v];
      best_cost[v] = better ? cost[v] : best_cost[v];
      best.d[v] = better ? d[v] : best.d[v];
      best.c[v] = better ? found[v].c : best.c[v];
    }
    if (round == 0) {
      for (int v = 0; v < kN; ++v) {
        start[v] = d[v] * found[v].c;
        d[v] = cx[v] * inverse_or_zero(cc[v]);
      }
    } else {
      // As llama.cpp has it, whose blocks are found again: the largest scale is -128 d.
      V negative[kN];
      for (int v = 0; v < kN; ++v) {
        start[v] = d[v] = found[v].xq * inverse_or_zero(found[v].qq);
        negative[v] = V{} - start[v];
      }
      M::template largest<16>(d);
      M::template largest<16>(negative);
      for (int v = 0; v < kN; ++v) d[v] = (d[v] > negative[v] ? V{} - d[v] : negative[v]) / 128.0f;
    }
  }
  return best;
}

// The half d that suits one block of q4_0 best.
template <typename M, bool kWeighted>
MLLAMA_SEARCH typename M::V search_q4_0(const SubBlocks<M, 32, kWeighted>& b, int v) {
  using V = typename M::V;
  constexpr int kTrials = 33;
  const V per_largest = inverse_or_zero(largest_by_magnitude(b, v));
  V best{}, best_cost{};
  for (int side = 0; side < 2; ++side) {
    for (int trial = 0; trial < kTrials; ++trial) {
      const float steps = 6.0f + 0.125f * static_cast<float>(trial);
      const V inverse = per_largest * (side == 0 ? -steps : steps);
      const CodeSums<V> s = code_sums<-8, 7, false>(b, v, inverse, V{});
      const V d = M::half(s.xq * inverse_or_zero(s.qq));
      const CodeSums<V> t = code_sums<-8, 7, false>(b, v, inverse_or_zero(d), V{});
      const V cost = d * (d * t.qq - 2.0f * t.xq);
      const auto better = cost < best_cost;
      best = better ? d : best;
      best_cost = better ? cost : best_cost;
    }
  }
  return best;
}

}  // namespace
}  // namespace mllama
