// Where the K and V of a task's slots lie, and how sixteen of them are taken together.
//
// Whoever made the task has seen to it that every page which one of its rows sees exists. Other entries of the page
// table may hold anything, and so may the slots of their pages: an entry that names no page stands for zeros.
#pragma once

#include "attention/cpu/tile.h"

namespace specdec::cpu::SPECDEC_ISA {

template <class Element>
class TaskSlots {
 public:
  explicit TaskSlots(const Task& task) : task_(task), p_(*task.params) {}

  const Element* v_at(int slot) const { return v_of(place_of(slot)); }

  // Sixteen slots as they lie, when all of them are there at one stride; else a copy, with zeros past the end. Rows of
  // pairs start at even elements.
  template <int kPairs>
  void gather(int slot, int end, Group<Element>& k, Group<Element>& v, Element* k_copy, Element* v_copy) const {
    const bool whole = slot + kGroupSlots <= end;
    const bool run = !p_.page_table || slot % p_.page_size + kGroupSlots <= p_.page_size;
    const bool even = (p_.k_stride_slot | p_.v_stride_slot) % kPairs == 0;
    if (whole && run && even) {
      const Place place = place_of(slot);
      if (place.exists) {
        k = {k_of(place), p_.k_stride_slot};
        v = {v_of(place), p_.v_stride_slot};
        return;
      }
    }
    const size_t bytes = p_.dim * sizeof(Element);
    for (int i = 0; i < kGroupSlots; i++) {
      const Place place = slot + i < end ? place_of(slot + i) : Place{0, 0, false};
      if (place.exists) {
        std::memcpy(k_copy + i * p_.dim, k_of(place), bytes);
        std::memcpy(v_copy + i * p_.dim, v_of(place), bytes);
      } else {
        std::memset(k_copy + i * p_.dim, 0, bytes);
        std::memset(v_copy + i * p_.dim, 0, bytes);
      }
    }
    k = {k_copy, p_.dim};
    v = {v_copy, p_.dim};
  }

  // Up to `most` slots to fetch ahead, even if they are another split's: as a rule the same thread goes on with it.
  Ahead ahead(int slot, int most) const {
    const int count = min_of(most, task_.slots - slot);
    if (count <= 0 || (p_.page_table && slot % p_.page_size + count > p_.page_size)) return Ahead{};
    const Place place = place_of(slot);
    if (!place.exists) return Ahead{};
    Ahead next;
    next.k = reinterpret_cast<const char*>(k_of(place));
    next.v = reinterpret_cast<const char*>(v_of(place));
    next.k_stride = int64_t(p_.k_stride_slot * sizeof(Element));
    next.v_stride = int64_t(p_.v_stride_slot * sizeof(Element));
    next.slots = count;
    next.bytes = int(p_.dim * sizeof(Element));
    return next;
  }

 private:
  struct Place {
    int64_t first;  // the request of a dense cache, the page of a paged one
    int64_t slot;   // in it
    bool exists;
  };

  Place place_of(int slot) const {
    if (!p_.page_table) return {task_.request, slot, true};
    const int page = read_once(p_.page_table + task_.request * p_.page_table_stride + slot / p_.page_size);
    return {page, slot % p_.page_size, page >= 0 && page < p_.pages};
  }

  const Element* k_of(const Place& place) const {
    return static_cast<const Element*>(p_.k_cache) + place.first * p_.k_stride_batch + place.slot * p_.k_stride_slot +
           task_.kv_head * p_.k_stride_head;
  }
  const Element* v_of(const Place& place) const {
    return static_cast<const Element*>(p_.v_cache) + place.first * p_.v_stride_batch + place.slot * p_.v_stride_slot +
           task_.kv_head * p_.v_stride_head;
  }

  const Task& task_;
  const TreeAttentionParams& p_;
};

}  // namespace specdec::cpu::SPECDEC_ISA
