// The rows and tiles of cross_attention: queries normalised on their way to the products.
#pragma once

#include "../common/rows.h"
#include "attention.h"
#include "sequence_rows.h"

namespace mllama::MLLAMA_ISA {

template <typename T, typename Params>
class CrossRows : public SequenceRows<T, Params> {
  using Base = SequenceRows<T, Params>;

 public:
  using Base::Base;

 protected:
  using Base::group_;
  using Base::p_;
  using Base::row;
  using Base::start;

  // Of tile t of sequence b; below 0: the tile is absent.
  int64_t slot(int64_t b, int64_t t) const {
    return p_.tile_table ? p_.tile_table[b * p_.tiles + t] : b * p_.tiles + t;
  }

  const T* query(int64_t b, int64_t h, int64_t t, int64_t g) const {
    return row(p_.q, b, t, p_.q_batch_stride, p_.q_token_stride) +
           (h * group_ + g) * p_.q_head_stride;
  }

  // The queries of key head h, token by token, (tokens * group, head_dim) contiguous.
  void load_queries(int64_t b, int64_t h, int64_t first, int64_t tokens, T* out) const {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t g = 0; g < group_; ++g, out += p_.head_dim) {
        const T* x = query(b, h, first + t, g);
        if (p_.q_norm_weight) {
          rms_norm_row(x, static_cast<const T*>(p_.q_norm_weight), out, p_.head_dim, p_.eps);
        } else {
          memcpy(out, x, p_.head_dim * sizeof(T));
        }
      }
    }
  }

  // Tile t of sequence b, for key head h and the rows from `first` on. Its slot is not below 0.
  Segment segment(int64_t b, int64_t h, int64_t t, int64_t first) const {
    const int64_t s = slot(b, t);
    const bool* mask = p_.tile_mask;
    return {keys(p_.k, s * p_.k_slot_stride + h * p_.k_head_stride, p_.k_token_stride),
            keys(p_.v, s * p_.v_slot_stride + h * p_.v_head_stride, p_.v_token_stride),
            p_.tile_tokens,
            mask ? mask + (start(b) + first) * p_.tile_mask_row_stride + t : nullptr};
  }

 private:
  static KeyRows keys(const void* base, int64_t offset, int64_t token_stride) {
    const T* first = static_cast<const T*>(base) + offset;
    return {reinterpret_cast<const char*>(first), token_stride * (int64_t)sizeof(T), nullptr, 0, 0};
  }
};

}  // namespace mllama::MLLAMA_ISA
