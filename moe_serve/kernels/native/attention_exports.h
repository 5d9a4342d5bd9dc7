// Attention's C functions; see exports.h.

// Floats of the workspace that paged_attention needs.
MS_VISIBLE int64_t MS_EXPORT(attention_workspace)(
    const ms::AttentionPlan* plan, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim) {
    return MS_ISA::attention_workspace(*plan, num_heads, num_kv_heads, head_dim);
}

MS_VISIBLE void MS_EXPORT(paged_attention)(
    int32_t threads, int32_t dtype, const ms::AttentionPlan* plan, const void* query,
    int64_t query_stride, const void* key_cache, const void* value_cache, int64_t num_slots,
    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, float scale, const float* sinks,
    void* out, float* workspace) {
    MS_TEAM(paged_attention<T>(
        *plan, (const T*)query, query_stride, (const T*)key_cache, (const T*)value_cache, num_slots,
        num_heads, num_kv_heads, head_dim, scale, sinks, (T*)out, workspace));
}
