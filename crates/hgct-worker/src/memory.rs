//! Memory of this process: what is resident, what was at most, and giving free memory back.

/// Resident memory of this process, bytes; 0 where the system does not tell.
pub(crate) fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split_whitespace().nth(1).and_then(|field| field.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// Largest resident memory since [`begin_peak`], bytes; where the system does not let a process
/// begin anew, since it started.
pub(crate) fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")).and_then(|kib| kib.trim().parse().ok());
    // The system counts pages in batches: what is resident now may be more.
    kib.map_or(0, |kib: u64| kib * 1024).max(resident_bytes())
}

/// Begins a new peak at what is resident now.
pub(crate) fn begin_peak() {
    // Where that is not allowed the peak stays that of the whole process: an upper bound.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Gives free memory back to the system. An allocator that keeps large blocks on the heap, as that
/// of a worker is told to, never does so by itself: what a check or a measurement once needed would
/// count for the rest of the worker's life.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes the allocator's own locks; no block in use is touched.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peak_is_seen_and_begins_anew() {
        const BYTES: usize = 256 << 20;
        begin_peak();
        let before = peak_bytes();
        let block = vec![1u8; BYTES];
        assert!(block.iter().step_by(4096).all(|byte| *byte == 1));
        drop(block);
        let with_block = peak_bytes();
        assert!(with_block >= before + BYTES as u64 / 2, "{before} then {with_block}");
        give_back();
        begin_peak();
        if resident_bytes() + (BYTES as u64) / 2 < with_block {
            assert!(peak_bytes() + (BYTES as u64) / 4 < with_block, "{with_block} then {}", peak_bytes());
        }
    }
}
