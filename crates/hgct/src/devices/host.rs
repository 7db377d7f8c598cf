//! The host that devices share: its processor, cores and memory.

use std::path::Path;

use rustix::thread::{CpuSet, sched_getaffinity};

/// Processor, cores and memory of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    /// The processor's own name.
    pub(crate) processor: String,
    /// The kernel, which is the processor's driver.
    pub(crate) kernel: Option<String>,
    /// Cores that this process may run on, by the system's numbers.
    pub(crate) cores: Vec<u32>,
    /// Memory that devices may share, bytes.
    pub(crate) memory_bytes: u64,
}

/// Part of the memory that stays with the system, the agent and the coordinator: an eighth.
const RESERVED: u64 = 8;
const GIB: u64 = 1 << 30;

impl Host {
    /// Looks at the host whose file system begins at `root`.
    pub(crate) fn look(root: &Path) -> Self {
        let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
        let memory = memory_total(&read("proc/meminfo")).min(memory_limit(root));
        let shared = memory - memory / RESERVED;
        // Whole GiB where there are some, so that the document is the same after every boot.
        let memory_bytes = if shared >= GIB { shared / GIB * GIB } else { shared };
        let release = read("proc/sys/kernel/osrelease");
        let kernel = release.split(['-', '+', '\n']).next().filter(|release| !release.is_empty());
        let kernel = kernel.map(|release| format!("Linux {release}"));
        Self { processor: processor(&read("proc/cpuinfo")), kernel, cores: allowed_cores(), memory_bytes }
    }
}

/// Cores that this process may run on, ascending. A grant counts cores by their place in this list.
pub(crate) fn allowed_cores() -> Vec<u32> {
    match sched_getaffinity(None) {
        Ok(set) => (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).map(|core| core as u32).collect(),
        Err(_) => (0..std::thread::available_parallelism().map_or(1, |n| n.get() as u32)).collect(),
    }
}

fn processor(cpuinfo: &str) -> String {
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
        line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned())
    };
    // Arm names only implementer and part.
    let arm = || Some(format!("arm {} {}", field("CPU implementer")?, field("CPU part")?));
    field("model name")
        .or_else(|| field("cpu model"))
        .or_else(arm)
        .unwrap_or_else(|| std::env::consts::ARCH.into())
}

fn memory_total(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// What a control group leaves us, where it is the file system's first: in a container.
fn memory_limit(root: &Path) -> u64 {
    ["sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .filter_map(|path| std::fs::read_to_string(root.join(path)).ok()?.trim().parse().ok())
        .min()
        .unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_linux_says() {
        assert_eq!(processor("processor\t: 0\nmodel name\t: AMD EPYC 9R14\n"), "AMD EPYC 9R14");
        assert_eq!(processor("CPU implementer\t: 0x48\nCPU part\t: 0xd01\n"), "arm 0x48 0xd01");
        assert_eq!(memory_total("MemTotal:       24576000 kB\nMemFree: 1 kB\n"), 24_576_000 * 1024);
        assert_eq!(memory_total(""), 0);
    }

    #[test]
    fn a_containers_limit_counts() {
        let root = tempfile::tempdir().unwrap();
        for folder in ["proc", "sys/fs/cgroup"] {
            std::fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        std::fs::write(root.path().join("proc/meminfo"), "MemTotal: 16777216 kB\n").unwrap();
        assert_eq!(Host::look(root.path()).memory_bytes, 14 * GIB);
        std::fs::write(root.path().join("sys/fs/cgroup/memory.max"), format!("{}\n", 8 * GIB)).unwrap();
        assert_eq!(Host::look(root.path()).memory_bytes, 7 * GIB);
    }

    #[test]
    fn this_host_has_cores_and_memory() {
        let host = Host::look(Path::new("/"));
        assert!(!host.cores.is_empty() && host.memory_bytes > 0 && !host.processor.is_empty());
    }
}
