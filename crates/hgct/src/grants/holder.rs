//! Holding a worker's threads to its grant.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hgct_core::cluster::Isolation;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};

use super::cgroup::{Hierarchy, PERIOD_US, PREFIX, parent, process_time_ns, start_time, sweep};
use super::{Error, Result};

/// Makes groups under our own and removes what dead agents left there.
#[derive(Debug)]
pub(crate) struct Holder {
    hierarchy: Hierarchy,
    owner: String,
}

impl Holder {
    /// Finds the hierarchy that owns the `cpu` controller.
    pub(crate) fn open() -> Result<Self> {
        let hierarchy = Hierarchy::find()?;
        hierarchy.folders().into_iter().for_each(sweep);
        let me = std::process::id().to_string();
        let owner = format!("{PREFIX}{me}.{}", start_time(&me).unwrap_or_default());
        Ok(Self { hierarchy, owner })
    }

    /// Makes a group that restrains nothing yet. `label` tells it from the others of this process.
    pub(crate) fn group(&self, label: &str) -> Result<Held> {
        let name = format!("{}.{}", self.owner, plain(label));
        let make = |folder: &Path| -> Result<PathBuf> {
            let group = folder.join(&name);
            match fs::create_dir(&group) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    Err(Error::io("making control group", &group, error))
                }
                _ => Ok(group),
            }
        };
        Ok(match &self.hierarchy {
            Hierarchy::V1 { cpu, accounting, memory } => {
                let cpu = make(cpu)?;
                // Without it, CPU time is read from the process, more coarsely.
                let accounting = accounting.as_deref().and_then(|folder| make(folder).ok());
                // Without it, memory is not held.
                let memory = memory.as_deref().and_then(|folder| make(folder).ok());
                let joined = accounting.iter().chain(&memory).cloned().collect();
                let usage = accounting.unwrap_or_else(|| cpu.clone()).join("cpuacct.usage");
                Held { version: Version::One, cpu, joined, memory, usage, pid: None }
            }
            Hierarchy::V2 { parent } => {
                let cpu = make(parent)?;
                let usage = cpu.join("cpu.stat");
                let memory = cpu.join("memory.max").exists().then(|| cpu.clone());
                Held { version: Version::Two, cpu, joined: Vec::new(), memory, usage, pid: None }
            }
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// A group, removed when dropped: its processes must have ended by then.
#[derive(Debug)]
pub(crate) struct Held {
    version: Version,
    cpu: PathBuf,
    /// Groups of other hierarchies that a process also joins.
    joined: Vec<PathBuf>,
    /// The group that holds memory, where there is one.
    memory: Option<PathBuf>,
    usage: PathBuf,
    pid: Option<u32>,
}

impl Held {
    /// Takes a process in, with all threads that it has and will have.
    pub(crate) fn join(&mut self, pid: u32) -> Result<()> {
        self.pid = Some(pid);
        for group in self.joined.iter().chain([&self.cpu]) {
            write(&group.join("cgroup.procs"), &pid.to_string())?;
        }
        Ok(())
    }

    /// Restrains the group to this much CPU time from now on; may be called again with another.
    pub(crate) fn set(&self, cpu_millicores: u32) -> Result<()> {
        let quota = (u64::from(cpu_millicores) * PERIOD_US / 1000).max(1000);
        match self.version {
            Version::One => {
                write(&self.cpu.join("cpu.cfs_period_us"), &PERIOD_US.to_string())?;
                write(&self.cpu.join("cpu.cfs_quota_us"), &quota.to_string())
            }
            Version::Two => write(&self.cpu.join("cpu.max"), &format!("{quota} {PERIOD_US}")),
        }
    }

    /// Restrains the group's memory: a process that wants more is killed by the kernel, and
    /// [`Held::was_out_of_memory`] says so. Where no controller is ours nothing happens.
    pub(crate) fn set_memory(&self, bytes: u64) -> Result<()> {
        let file = match self.version {
            Version::One => "memory.limit_in_bytes",
            Version::Two => "memory.max",
        };
        match &self.memory {
            Some(group) => write(&group.join(file), &bytes.to_string()),
            None => Ok(()),
        }
    }

    /// Whether the kernel has killed a process of the group for its memory.
    pub(crate) fn was_out_of_memory(&self) -> bool {
        let file = match self.version {
            Version::One => "memory.oom_control",
            Version::Two => "memory.events",
        };
        let Some(group) = &self.memory else { return false };
        let text = fs::read_to_string(group.join(file)).unwrap_or_default();
        let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        kills.is_some_and(|number| number.trim() != "0")
    }

    /// Lets the group use as much as there is.
    pub(crate) fn release(&self) -> Result<()> {
        match self.version {
            Version::One => write(&self.cpu.join("cpu.cfs_quota_us"), "-1"),
            Version::Two => write(&self.cpu.join("cpu.max"), &format!("max {PERIOD_US}")),
        }
    }

    /// CPU time of all threads that were ever in the group, nanoseconds.
    pub(crate) fn cpu_time_ns(&self) -> io::Result<u64> {
        match (fs::read_to_string(&self.usage), self.version, self.pid) {
            (Ok(text), Version::One, _) => text.trim().parse().map_err(io::Error::other),
            (Ok(text), Version::Two, _) => {
                let line = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
                let usage: u64 = line.unwrap_or_default().trim().parse().map_err(io::Error::other)?;
                Ok(usage * 1000)
            }
            (Err(_), _, Some(pid)) => process_time_ns(pid),
            (Err(error), ..) => Err(error),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for group in self.joined.iter().chain([&self.cpu]) {
            // A process that was just killed leaves its group a moment later.
            for _ in 0..20 {
                match fs::remove_dir(group) {
                    Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    // Gone, or the next agent's sweep will see to it.
                    _ => break,
                }
            }
        }
    }
}

/// Whether grants can be held here, tried on an empty group, and how or why not.
pub(crate) fn isolation() -> (Isolation, String) {
    let tried = Holder::open().and_then(|holder| {
        holder.group("trial")?.set(500)?;
        Ok(match holder.hierarchy {
            Hierarchy::V1 { .. } => "control groups (version 1)",
            Hierarchy::V2 { .. } => "control groups (version 2)",
        })
    });
    match tried {
        Ok(how) => (Isolation::Cgroup, how.into()),
        Err(error) => {
            let cause =
                std::error::Error::source(&error).map_or_else(String::new, |cause| format!(": {cause}"));
            (Isolation::Unisolated, format!("unisolated: {error}{cause}"))
        }
    }
}

/// Puts a process into the groups with this label of agents that this process started; in how many.
pub(crate) fn join_groups_of_agents(label: &str, pid: u32) -> Result<usize> {
    let hierarchy = Hierarchy::find()?;
    let label = plain(label);
    let mut joined = 0;
    for folder in hierarchy.folders() {
        let entries = fs::read_dir(folder).map_err(|error| Error::io("reading", folder, error))?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(owner) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
            let mut parts = owner.splitn(3, '.');
            let (agent, found) = (parts.next().unwrap_or_default(), parts.nth(1));
            if found == Some(&label) && parent(agent) == Some(std::process::id()) {
                write(&entry.path().join("cgroup.procs"), &pid.to_string())?;
                joined += 1;
            }
        }
    }
    Ok(joined)
}

/// A label as part of a folder's name.
fn plain(label: &str) -> String {
    label.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect()
}

/// Pins a process, with all threads that it has and will have, to cores by the system's numbers.
pub(crate) fn pin(pid: u32, cores: &[u32]) -> io::Result<()> {
    let set = core_set(cores);
    // A thread that starts meanwhile inherits from one that may not be pinned yet: until none is new.
    let mut done = BTreeSet::new();
    loop {
        let mut found_new = false;
        for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
            let thread: i32 = entry?.file_name().to_string_lossy().parse().map_err(io::Error::other)?;
            if done.insert(thread) {
                found_new = true;
                match sched_setaffinity(Pid::from_raw(thread), &set) {
                    // It has ended.
                    Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        if !found_new {
            return Ok(());
        }
    }
}

/// Cores by the system's numbers as a set.
pub(crate) fn core_set(cores: &[u32]) -> CpuSet {
    let mut set = CpuSet::new();
    for core in cores.iter().filter(|core| (**core as usize) < CpuSet::MAX_CPU) {
        set.set(*core as usize);
    }
    set
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).map_err(|source| Error::io("writing", file, source))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::process::{Command, Stdio};
    use std::time::Instant;

    use super::*;

    /// The holder, or `None` and the reason on standard error where the host does not allow it.
    fn holder() -> Option<Holder> {
        match isolation() {
            (Isolation::Cgroup, _) => Some(Holder::open().unwrap()),
            (_, reason) => {
                // Past the test runner, which swallows what a passing test prints.
                let _ = writeln!(std::io::stderr(), "SKIPPED: {reason}");
                None
            }
        }
    }

    /// Two processes that work for ever once a line comes in; killed when dropped, also by a panic.
    struct Busy(std::process::Child);

    impl Busy {
        fn new() -> Self {
            let script = "read go; while :; do :; done & echo; while :; do :; done";
            let mut command = Command::new("/bin/sh");
            command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
            Self(crate::process::Group::spawn(&mut command).unwrap().0)
        }

        fn go(&mut self) {
            self.0.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
            assert_eq!(self.0.stdout.as_mut().unwrap().read(&mut [0]).unwrap(), 1);
        }
    }

    impl Drop for Busy {
        fn drop(&mut self) {
            let _ =
                rustix::process::kill_process_group(Pid::from_child(&self.0), rustix::process::Signal::KILL);
            let _ = self.0.wait();
        }
    }

    /// CPU over wall time of the group while `wall` passes.
    fn share(held: &Held, wall: Duration) -> f64 {
        let (begin, used) = (Instant::now(), held.cpu_time_ns().unwrap());
        std::thread::sleep(wall);
        (held.cpu_time_ns().unwrap() - used) as f64 / begin.elapsed().as_nanos() as f64
    }

    #[test]
    fn a_quota_holds_and_can_be_changed_while_running() {
        let Some(holder) = holder() else { return };
        let mut held = holder.group("test/quota:0").unwrap();
        held.set(200).unwrap();
        let mut child = Busy::new();
        held.join(child.0.id()).unwrap();
        child.go();
        // An upper bound holds however busy the host is.
        let limited = share(&held, Duration::from_millis(600));
        assert!(limited < 0.25, "held to .2 of a core, used {limited:.3}");
        held.set(100).unwrap();
        let lower = share(&held, Duration::from_millis(600));
        assert!(lower < 0.14, "held to .1 of a core, used {lower:.3}");
        held.release().unwrap();
        assert_eq!(fs::read_to_string(held.cpu.join("cgroup.procs")).unwrap().lines().count(), 2);
        drop(child);
        let group = held.cpu.clone();
        drop(held);
        assert!(!group.exists(), "the group was left behind");
    }

    #[test]
    fn all_threads_are_pinned() {
        let cores = crate::devices::allowed_cores();
        let mut child = Command::new("/bin/sh").args(["-c", "read x"]).stdin(Stdio::piped()).spawn().unwrap();
        pin(child.id(), &cores[..1]).unwrap();
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
        assert_eq!(line.trim(), cores[0].to_string());
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(pin(child.id(), &cores[..1]).is_err());
    }

    #[test]
    fn who_takes_more_memory_than_granted_is_ended_and_known() {
        let Some(holder) = holder() else { return };
        let mut held = holder.group("test/memory:0").unwrap();
        if held.memory.is_none() {
            let _ = writeln!(std::io::stderr(), "SKIPPED: no `memory` controller is ours here");
            return;
        }
        held.set_memory(64 << 20).unwrap();
        let hungry = "read go; x=x; while :; do x=$x$x; done";
        let mut child = Command::new("/bin/sh").args(["-c", hungry]).stdin(Stdio::piped()).spawn().unwrap();
        held.join(child.id()).unwrap();
        assert!(!held.was_out_of_memory());
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(held.was_out_of_memory());
    }
}
