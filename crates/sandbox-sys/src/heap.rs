//! The allocator of a process that lives for long and now and then holds something large.

/// Has large buffers given back to the kernel as soon as they are freed: mallopt(3).
///
/// Left alone, glibc takes each large buffer that is freed as a sign that more will come, and keeps up to 64 MiB of them in
/// each of its arenas, of which there are eight for every processor.
pub fn give_back_what_is_large() {
    #[cfg(target_env = "gnu")]
    {
        /// From this size on, a buffer is a mapping of its own: the size that glibc begins with.
        const OWN_MAPPING_BYTES: libc::c_int = 128 << 10;
        const ARENAS: libc::c_int = 2;
        // SAFETY: mallopt(3) takes two numbers, and may be called at any time. A setting that it refuses stays as it was.
        unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_MAPPING_BYTES) };
        // SAFETY: as above.
        unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, 2 * OWN_MAPPING_BYTES) };
        // SAFETY: as above.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
    }
}
