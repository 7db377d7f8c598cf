//! Control groups as files: which hierarchy owns the `cpu` controller, and what its files are called.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Error, Result};

/// Length of a quota's period: short, so that a throttled stack keeps the others waiting briefly.
pub(super) const PERIOD_US: u64 = 20_000;
/// What every group of ours is called: `hgct.PID.START.LABEL`.
pub(super) const PREFIX: &str = "hgct.";

/// Where our groups go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Hierarchy {
    /// One hierarchy a controller; the folders in which to make groups.
    V1 {
        /// Of `cpu`.
        cpu: PathBuf,
        /// Of `cpuacct`, where it is another hierarchy.
        accounting: Option<PathBuf>,
        /// Of `memory`.
        memory: Option<PathBuf>,
    },
    /// One hierarchy for all; a folder whose children have the `cpu` controller.
    V2 {
        /// The folder.
        parent: PathBuf,
    },
}

impl Hierarchy {
    /// Finds our own groups from `/proc/self/cgroup` and `/proc/self/mountinfo`.
    pub(super) fn find() -> Result<Self> {
        let read = |file: &str| {
            fs::read_to_string(file).map_err(|source| Error::io("reading", Path::new(file), source))
        };
        Self::choose(&read("/proc/self/cgroup")?, &read("/proc/self/mountinfo")?)
    }

    fn choose(own: &str, mounts: &str) -> Result<Self> {
        if let Some(cpu) = v1_folder(own, mounts, "cpu") {
            let accounting = v1_folder(own, mounts, "cpuacct").filter(|folder| *folder != cpu);
            return Ok(Self::V1 { cpu, accounting, memory: v1_folder(own, mounts, "memory") });
        }
        let mount = mounts.lines().filter_map(Mount::parse).find(|mount| mount.kind == "cgroup2");
        let path = own.lines().find_map(|line| line.strip_prefix("0::"));
        if let (Some(mount), Some(path)) = (mount, path) {
            let folder = mount.folder(path);
            if let Some(parent) = v2_parent(&folder, Path::new(mount.point)) {
                return Ok(Self::V2 { parent });
            }
        }
        let mut found: Vec<&str> = own.lines().collect();
        found.truncate(16);
        Err(Error::NoController { found: found.join(" ") })
    }

    /// The folders in which groups of ours may lie.
    pub(super) fn folders(&self) -> Vec<&Path> {
        match self {
            Self::V1 { cpu, accounting, memory } => [Some(cpu), accounting.as_ref(), memory.as_ref()]
                .into_iter()
                .flatten()
                .map(PathBuf::as_path)
                .collect(),
            Self::V2 { parent } => vec![parent],
        }
    }
}

struct Mount<'a> {
    root: &'a str,
    point: &'a str,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    /// One line of mountinfo: `id parent dev root point options … - kind source super-options`.
    fn parse(line: &'a str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, point) = (left.next()?, left.next()?);
        let mut right = right.split(' ');
        Some(Self { root, point, kind: right.next()?, options: right.nth(1)? })
    }

    /// The folder of a group, which in a container is seen from the mount's root.
    fn folder(&self, group: &str) -> PathBuf {
        let inside = Path::new(group).strip_prefix(self.root).unwrap_or(Path::new(""));
        let folder = Path::new(self.point).join(inside.strip_prefix("/").unwrap_or(inside));
        if folder.is_dir() { folder } else { self.point.into() }
    }
}

fn v1_folder(own: &str, mounts: &str, controller: &str) -> Option<PathBuf> {
    let has = |list: &str| list.split(',').any(|name| name == controller);
    let mount =
        mounts.lines().filter_map(Mount::parse).find(|mount| mount.kind == "cgroup" && has(mount.options))?;
    let group = own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        has(fields.next()?).then(|| fields.next())?
    })?;
    Some(mount.folder(group))
}

/// The nearest group from ours upwards whose children may have the `cpu` controller. Ours has
/// processes of its own (us), and such a group may give controllers to children only at the root.
fn v2_parent(own: &Path, top: &Path) -> Option<PathBuf> {
    for folder in own.ancestors().take_while(|folder| folder.starts_with(top)) {
        let has = |file: &str| {
            let list = fs::read_to_string(folder.join(file)).unwrap_or_default();
            list.split_whitespace().any(|name| name == "cpu")
        };
        if !has("cgroup.controllers") {
            continue;
        }
        if has("cgroup.subtree_control") || fs::write(folder.join("cgroup.subtree_control"), "+cpu").is_ok() {
            // Welcome, not needed.
            let _ = fs::write(folder.join("cgroup.subtree_control"), "+memory");
            return Some(folder.to_owned());
        }
    }
    None
}

/// Removes groups of agents that are gone; one with processes in it stays (it may belong to an
/// agent in another process namespace).
pub(super) fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(owner) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        let mut parts = owner.split('.');
        let (Some(pid), Some(start)) = (parts.next(), parts.next()) else { continue };
        if start_time(pid).as_deref() != Some(start) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// When a process started, in ticks since boot: with the id it names one process for ever.
pub(super) fn start_time(pid: &str) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat_fields(&stat).nth(19).map(str::to_owned)
}

/// The parent of a living process.
pub(super) fn parent(pid: &str) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat_fields(&stat).nth(1)?.parse().ok()
}

/// User and system time of a living process from `/proc/PID/stat`, nanoseconds, in ticks of 10 ms.
pub(super) fn process_time_ns(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let ticks: u64 = stat_fields(&stat).skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    Ok(ticks * (1_000_000_000 / rustix::param::clock_ticks_per_second().max(1)))
}

/// The fields after the name, which stands in parentheses and may hold anything.
fn stat_fields(stat: &str) -> impl Iterator<Item = &str> {
    stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mountinfo(point: &Path, root: &str, kind: &str, options: &str) -> String {
        format!("33 31 0:30 {root} {} rw,relatime shared:9 - {kind} cgroup rw,{options}\n", point.display())
    }

    #[test]
    fn the_first_version_is_found_per_controller() {
        let top = tempfile::tempdir().unwrap();
        for folder in ["cpu/job", "memory/job"] {
            fs::create_dir_all(top.path().join(folder)).unwrap();
        }
        let mounts = mountinfo(&top.path().join("cpu"), "/", "cgroup", "cpu,cpuacct")
            + &mountinfo(&top.path().join("memory"), "/box", "cgroup", "memory");
        let found = Hierarchy::choose("4:memory:/box/job\n1:cpu,cpuacct:/job\n0::/\n", &mounts).unwrap();
        let (cpu, memory) = (top.path().join("cpu/job"), Some(top.path().join("memory/job")));
        assert_eq!(found, Hierarchy::V1 { cpu, accounting: None, memory });
    }

    #[test]
    fn the_second_version_is_climbed_to_where_children_may_have_cpu() {
        let top = tempfile::tempdir().unwrap();
        let own = top.path().join("user/session");
        fs::create_dir_all(&own).unwrap();
        for folder in [top.path(), &top.path().join("user"), &own] {
            fs::write(folder.join("cgroup.controllers"), "cpu memory\n").unwrap();
            // A folder in its place: writing to it fails, as to a group with processes of its own.
            fs::create_dir(folder.join("cgroup.subtree_control")).unwrap();
        }
        let mounts = mountinfo(top.path(), "/", "cgroup2", "nsdelegate");
        let choose = || Hierarchy::choose("0::/user/session\n", &mounts);
        assert!(matches!(choose(), Err(Error::NoController { .. })));
        fs::remove_dir(top.path().join("user/cgroup.subtree_control")).unwrap();
        fs::write(top.path().join("user/cgroup.subtree_control"), "memory cpu\n").unwrap();
        assert_eq!(choose().unwrap(), Hierarchy::V2 { parent: top.path().join("user") });
    }

    #[test]
    fn without_the_controller_the_reason_names_what_there_is() {
        let error = Hierarchy::choose("0::/x\n", "").unwrap_err();
        assert_eq!(error.to_string(), "no control group here has the `cpu` controller: 0::/x");
    }

    #[test]
    fn only_what_the_dead_left_is_swept() {
        let top = tempfile::tempdir().unwrap();
        let me = std::process::id().to_string();
        let mine = format!("hgct.{me}.{}.torch", start_time(&me).unwrap());
        let reused = format!("hgct.{me}.1.torch");
        for name in [mine.as_str(), reused.as_str(), "hgct.999999999.5.jax", "other"] {
            fs::create_dir(top.path().join(name)).unwrap();
        }
        sweep(top.path());
        assert!(top.path().join(mine).exists() && top.path().join("other").exists());
        assert!(!top.path().join(reused).exists() && !top.path().join("hgct.999999999.5.jax").exists());
    }
}
