// How work is shared: every kernel is a function that all threads of an OpenMP team call together,
// so that several can follow one another in one parallel region. Loops hand out items as threads
// come for them (a thread that is held up does not hold up the others) and end with a barrier.

// Memory of one thread that lives on between calls; what it held is lost at the next `get`.
class Scratch {
  public:
    ~Scratch() { free(memory_); }

    template <class T>
    T* get(int64_t count) {
        size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
        if (bytes > size_) {
            free(memory_);
            memory_ = aligned_alloc(64, bytes);
            size_ = memory_ ? bytes : 0;
            if (!memory_) abort();  // a few hundred kilobytes: the system itself is at its end
        }
        return static_cast<T*>(memory_);
    }

  private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

// Rows as the weights' type wants them: as they are, or copied, widened and padded with zeros.
template <class TRow, class TWeight>
class RowsFor {
  public:
    const TWeight* const* operator()(const TRow* const* rows, int64_t count, int64_t in_features) {
        if constexpr (std::is_same<TRow, TWeight>::value) {
            if (in_features % depth_of<TWeight>() == 0) return rows;
        }
        static thread_local Scratch scratch;
        int64_t stride = ceil_div(in_features + 1, kLanes) * kLanes;
        TWeight* copies = scratch.get<TWeight>(count * stride);
        for (int64_t row = 0; row < count; row++) {
            TWeight* copy = copies + row * stride;
            int64_t at = 0;
            for (; at + kLanes <= in_features; at += kLanes)
                store(copy + at, load(rows[row] + at));
            store(copy + at, load(rows[row] + at, in_features - at));
            pointers_[row] = copy;
        }
        return pointers_;
    }

  private:
    const TWeight* pointers_[kMaxRows];
};
