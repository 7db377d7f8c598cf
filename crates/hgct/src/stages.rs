//! The stages before training: discover → check → profile → plan. Each leaves a document; check and
//! profile are kept by environment, device, driver and grant, and done again only when one of them
//! changes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hgct_control::message::UnusableDevice;
use hgct_core::canonical::Hash;
use hgct_core::check::{CheckReport, Verdict};
use hgct_core::cluster::{ClusterSpec, DeviceSpec, Isolation};
use hgct_core::ids::{DeviceId, NodeId};
use hgct_core::job::JobSpec;
use hgct_core::model::ModelSpec;
use hgct_core::profile::{DeviceProfile, LinkProfile, Profile};

use crate::session::{Inventory, Session, isolation, with_grants};
use crate::vendors::NATIVE;
use crate::workspace::Workspace;

/// Time for the conformance suite of one device.
const CHECK_BUDGET: Duration = Duration::from_secs(55);
/// Time for the measurement of one device.
const PROFILE_BUDGET: Duration = Duration::from_secs(45);

/// Part of a core that these times are meant for; software adapters with less get more time. The check
/// ends when it is done, while a measurement uses its time up, so the first has room to spare.
const CHECK_MILLICORES: u32 = 800;
const PROFILE_MILLICORES: u32 = 400;
/// So many times as much at most: a hanging device must be told some time.
const LARGEST_BUDGET: f64 = 4.0;

/// Raised when kept results mean something else.
const CACHE_FORMAT: u32 = 2;

/// Which devices take part, and in what state they are.
pub(crate) struct Fleet {
    /// The cluster as policy grants it, every usable device in it.
    pub(crate) cluster: ClusterSpec,
    /// What the suite said.
    pub(crate) checks: Vec<CheckReport>,
    /// Devices that were set aside, with the reason.
    pub(crate) set_aside: Vec<(DeviceId, String)>,
    /// What was found and cannot be used at all, such as an environment that does not import.
    pub(crate) unusable: Vec<(NodeId, UnusableDevice)>,
    /// Devices whose workers run.
    pub(crate) started: BTreeSet<DeviceId>,
    /// How grants are held, in words.
    pub(crate) isolation_note: String,
    /// Whether workers are held to their grants by now.
    held: bool,
}

/// What the stages may be told.
#[derive(Debug, Clone)]
pub(crate) struct Choices {
    /// A cluster document in place of the discovered one.
    pub(crate) cluster: Option<PathBuf>,
    /// Only these devices.
    pub(crate) devices: Vec<DeviceId>,
    /// Use devices that failed the check.
    pub(crate) force: bool,
    /// Do again what was kept.
    pub(crate) fresh: bool,
    /// What cannot be used is told by who asks: it is no error that nothing else is there.
    pub(crate) tells_unusable: bool,
    /// How long a device may measure itself.
    pub(crate) profile_budget: Duration,
}

impl Default for Choices {
    fn default() -> Self {
        Self {
            cluster: None,
            devices: Vec::new(),
            force: false,
            fresh: false,
            tells_unusable: false,
            profile_budget: PROFILE_BUDGET,
        }
    }
}

impl Fleet {
    /// Asks all agents for their devices and gives grants by policy, or takes the cluster document.
    pub(crate) fn discover(session: &mut Session, choices: &Choices) -> Result<(Self, Inventory)> {
        let inventory = session.discover()?;
        let mut cluster = match &choices.cluster {
            None => with_grants(inventory.nodes.clone())?,
            Some(path) => read_cluster(path, &inventory)?,
        };
        if !choices.devices.is_empty() {
            for device in &choices.devices {
                let is_known = cluster.device(device).is_some()
                    || (choices.tells_unusable && why_unusable(&inventory.unusable, device).is_some());
                if !is_known {
                    bail!(UnknownDevice { device: device.clone(), known: names(&cluster) });
                }
            }
            for node in &mut cluster.nodes {
                node.devices.retain(|device| choices.devices.contains(&device.id));
            }
        }
        let told = choices.tells_unusable && !inventory.unusable.is_empty();
        if cluster.devices().next().is_none() && !told {
            let reasons: Vec<String> = inventory
                .unusable
                .iter()
                .map(|(node, device)| format!("\n  {node}: {}: {}", device.name, device.reason))
                .collect();
            bail!("no device can be used{}\nsee `hgct devices`", reasons.concat());
        }
        for (node, row) in &inventory.unusable {
            eprintln!("{node}: {} is set aside: {}", row.name, row.reason);
        }
        let fleet = Self {
            cluster,
            checks: Vec::new(),
            set_aside: Vec::new(),
            unusable: inventory.unusable.clone(),
            started: BTreeSet::new(),
            isolation_note: String::new(),
            held: false,
        };
        Ok((fleet, inventory))
    }

    /// Starts the workers that do not run yet; a device whose worker does not start is set aside.
    pub(crate) fn start(&mut self, session: &mut Session, devices: &[DeviceSpec]) -> Result<()> {
        let missing: Vec<(NodeId, DeviceSpec)> = self
            .cluster
            .devices()
            .filter(|(_, device)| {
                devices.iter().any(|wanted| wanted.id == device.id) && !self.started.contains(&device.id)
            })
            .map(|(node, device)| (node.name.clone(), device.clone()))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let failed = session.start_workers(&missing)?;
        self.started.extend(missing.into_iter().map(|(_, device)| device.id));
        for (device, reason) in failed {
            self.set_aside(&device, format!("its worker does not start: {reason}"));
        }
        self.held = false;
        Ok(())
    }

    /// Holds all running workers to their grants. Where that cannot be, the cluster says so.
    pub(crate) fn hold(&mut self, session: &mut Session) -> Result<()> {
        if self.held {
            return Ok(());
        }
        let held = session.hold_grants()?;
        let mut notes = Vec::new();
        for (name, (isolated, note)) in held {
            if !isolated {
                for node in self.cluster.nodes.iter_mut().filter(|node| node.name == name) {
                    node.isolation = Isolation::Unisolated;
                }
            }
            notes.push(format!("{name}: {note}"));
        }
        self.isolation_note = notes.join("; ");
        self.held = true;
        Ok(())
    }

    /// Checks every device that was not checked as it is now, side by side; those that fail are set
    /// aside unless forced.
    pub(crate) fn check(
        &mut self,
        session: &mut Session,
        workspace: &Workspace,
        choices: &Choices,
    ) -> Result<()> {
        let devices = self.devices();
        let (mut reports, mut unknown) = (Vec::new(), Vec::new());
        for device in devices {
            match workspace.cached::<CheckReport>("check", &check_key(&device)).filter(|_| !choices.fresh) {
                Some(report) if report.device == device.id => reports.push(report),
                _ => unknown.push(device),
            }
        }
        if !unknown.is_empty() {
            let budget = budget(CHECK_BUDGET, CHECK_MILLICORES, &unknown);
            eprintln!("check: {} devices side by side, up to {} s", unknown.len(), budget.as_secs() + 5);
            self.start(session, &unknown)?;
            self.hold(session)?;
            unknown.retain(|device| self.cluster.device(&device.id).is_some());
            let started = Instant::now();
            let (fresh, failed) = session.check(&unknown, budget, &mut |report| {
                eprintln!(
                    "check: {}: {} after {:.0} s",
                    report.device,
                    report.verdict,
                    started.elapsed().as_secs_f64()
                );
            })?;
            for report in fresh {
                if let Some(device) = unknown.iter().find(|device| device.id == report.device) {
                    workspace.keep("check", &check_key(device), &report)?;
                }
                reports.push(report);
            }
            for (device, reason) in failed {
                self.set_aside(&device, format!("no answer to the check: {reason}"));
            }
        }
        for report in &reports {
            if report.verdict == Verdict::Fail && !choices.force {
                let failed = report.checks.iter().find(|row| row.verdict == Verdict::Fail);
                let reason = failed.map_or_else(String::new, |row| format!("{}: {}", row.name, row.message));
                self.set_aside(
                    &report.device,
                    format!("failed the check: {reason} (--force uses it all the same)"),
                );
            }
        }
        reports.sort_by(|a, b| a.device.cmp(&b.device));
        self.checks = reports;
        if choices.tells_unusable { Ok(()) } else { self.require_one() }
    }

    /// Measures every device and link that was not measured as it is now.
    pub(crate) fn profile(
        &mut self,
        session: &mut Session,
        workspace: &Workspace,
        job: &JobSpec,
        model: &ModelSpec,
        choices: &Choices,
    ) -> Result<Profile> {
        let micro_batches = micro_batches(job);
        let seq_len = job.recipe.seq_len;
        let devices = self.devices();
        let key = |device: &DeviceSpec, fleet: &Self| {
            // Without isolation the others are part of what was measured.
            let others = if isolation(&fleet.cluster) == Isolation::Unisolated {
                names(&fleet.cluster)
            } else {
                String::new()
            };
            Hash::of(&(CACHE_FORMAT, identity(device), model, seq_len, &micro_batches, others))
        };
        let (mut rows, mut unknown) = (Vec::new(), Vec::new());
        for device in &devices {
            match workspace.cached::<DeviceProfile>("profile", &key(device, self)).filter(|_| !choices.fresh)
            {
                Some(row) if row.device == device.id => rows.push(row),
                _ => unknown.push(device.clone()),
            }
        }
        if !unknown.is_empty() {
            let budget = budget(choices.profile_budget, PROFILE_MILLICORES, &unknown);
            eprintln!("profile: {} devices side by side, about {} s", unknown.len(), budget.as_secs());
            self.start(session, &unknown)?;
            self.hold(session)?;
            let (fresh, failed) = session.profile(&unknown, model, seq_len, &micro_batches, budget)?;
            for row in fresh {
                if let Some(device) = unknown.iter().find(|device| device.id == row.device) {
                    workspace.keep("profile", &key(device, self), &row)?;
                }
                rows.push(row);
            }
            for (device, reason) in failed {
                self.set_aside(&device, format!("could not be measured: {reason}"));
            }
            self.require_one()?;
        }
        rows.retain(|row| self.cluster.device(&row.device).is_some());
        rows.sort_by(|a, b| a.device.cmp(&b.device));
        let links = self.links(session, workspace, choices)?;
        Ok(Profile {
            format: Profile::FORMAT,
            measured_at: crate::date::now(),
            model: Hash::of(model),
            seq_len,
            isolation: isolation(&self.cluster),
            devices: rows,
            links,
        })
    }

    fn links(
        &mut self,
        session: &mut Session,
        workspace: &Workspace,
        choices: &Choices,
    ) -> Result<Vec<LinkProfile>> {
        let devices = self.devices();
        let key = Hash::of(&(CACHE_FORMAT, "links", devices.iter().map(identity).collect::<Vec<_>>()));
        if let Some(links) = workspace.cached::<Vec<LinkProfile>>("links", &key).filter(|_| !choices.fresh) {
            return Ok(links);
        }
        self.start(session, &devices)?;
        self.hold(session)?;
        let ids: Vec<DeviceId> = self.devices().into_iter().map(|device| device.id).collect();
        let links = session.measure_links(&ids)?;
        workspace.keep("links", &key, &links)?;
        Ok(links)
    }

    /// The devices that are still in.
    pub(crate) fn devices(&self) -> Vec<DeviceSpec> {
        self.cluster.devices().map(|(_, device)| device.clone()).collect()
    }

    /// Takes a device out, with a line that says why.
    pub(crate) fn set_aside(&mut self, device: &DeviceId, reason: String) {
        eprintln!("{device} is set aside: {reason}");
        for node in &mut self.cluster.nodes {
            node.devices.retain(|known| known.id != *device);
        }
        self.set_aside.push((device.clone(), reason));
    }

    /// Why a device that is not in the cluster is not, if that is known.
    pub(crate) fn why_missing(&self, device: &DeviceId) -> Option<&str> {
        let set_aside = self.set_aside.iter().find(|(known, _)| known == device);
        set_aside.map(|(_, reason)| reason.as_str()).or_else(|| why_unusable(&self.unusable, device))
    }

    /// An error where no device is left.
    pub(crate) fn require_one(&self) -> Result<()> {
        if self.cluster.devices().next().is_some() {
            return Ok(());
        }
        bail!("no device is left: see the reasons above")
    }
}

/// Why a device's environment offers none, if that is known.
fn why_unusable<'a>(unusable: &'a [(NodeId, UnusableDevice)], device: &DeviceId) -> Option<&'a str> {
    let (node, rest) = device.as_str().split_once('/')?;
    let environment = rest.split_once(':')?.0;
    let of = |(name, row): &&(NodeId, UnusableDevice)| {
        name.as_str() == node && row.environment.as_ref().is_some_and(|found| found.as_str() == environment)
    };
    unusable.iter().find(of).map(|(_, row)| row.reason.as_str())
}

/// A device that nobody has.
#[derive(Debug, thiserror::Error)]
#[error("there is no device {device}; there are: {known}")]
pub(crate) struct UnknownDevice {
    device: DeviceId,
    known: String,
}

/// `usual`, or longer where a software adapter has less than `millicores` of a core.
fn budget(usual: Duration, millicores: u32, devices: &[DeviceSpec]) -> Duration {
    let software = devices.iter().filter(|device| device.engine == NATIVE && device.host_resource == "cpu");
    let least = software.map(|device| device.grant.cpu_millicores).min().unwrap_or(u32::MAX).max(1);
    usual.mul_f64((f64::from(millicores) / f64::from(least)).clamp(1.0, LARGEST_BUDGET))
}

/// The micro-batch sizes to measure: the policy's, else up to three that a global batch allows.
pub(crate) fn micro_batches(job: &JobSpec) -> Vec<u32> {
    if !job.policy.micro_batches.is_empty() {
        return job.policy.micro_batches.clone();
    }
    [1, 2, 4].into_iter().filter(|size| *size <= job.recipe.global_batch).collect()
}

fn check_key(device: &DeviceSpec) -> Hash {
    Hash::of(&(CACHE_FORMAT, identity(device)))
}

/// What makes a kept result this device's: hardware, driver (which compiles an adapter's kernels),
/// environment, grant.
fn identity(device: &DeviceSpec) -> impl serde::Serialize + use<> {
    let device = device.clone();
    (
        device.id,
        device.identity,
        device.driver,
        device.environment_hash,
        device.device_string,
        device.grant,
        env!("CARGO_PKG_VERSION"),
    )
}

fn names(cluster: &ClusterSpec) -> String {
    let names: Vec<&str> = cluster.devices().map(|(_, device)| device.id.as_str()).collect();
    names.join(", ")
}

/// Reads a cluster document of single devices.
pub(crate) fn parse_cluster(path: &Path) -> Result<ClusterSpec> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let cluster = ClusterSpec::from_toml(&path.to_string_lossy(), &text);
    match cluster {
        Err(hgct_core::Error::UnknownKey { file, key, .. }) if key == "group" => bail!(
            "{file} lists groups of nodes, which are planned for by hgct plan --model; a job needs the devices of \
             `hgct devices`: leave --cluster out, or give the cluster.toml of a run"
        ),
        cluster => Ok(cluster?),
    }
}

/// Which devices, and their grants, as the document says; what each of them is, as it is now. A document
/// may be older than an environment or a driver, and what was measured of those must not be taken for
/// what is here.
fn read_cluster(path: &Path, inventory: &Inventory) -> Result<ClusterSpec> {
    let mut cluster = parse_cluster(path)?;
    for node in &mut cluster.nodes {
        let here = inventory.nodes.iter().filter(|known| known.name == node.name);
        let here: Vec<&DeviceSpec> = here.flat_map(|node| &node.devices).collect();
        for device in &mut node.devices {
            let Some(found) = here.iter().find(|known| known.id == device.id) else {
                let reason = why_unusable(&inventory.unusable, &device.id);
                let reason = reason.map_or_else(String::new, |reason| format!(": {reason}"));
                bail!("{}: node {} does not have device {}{reason}", path.display(), node.name, device.id);
            };
            *device = DeviceSpec { grant: device.grant.clone(), ..(*found).clone() };
        }
    }
    Ok(cluster)
}

#[cfg(test)]
mod tests {
    use hgct_core::cluster::{Grant, NodeSpec};
    use hgct_core::ids::{EnvironmentId, Kind};

    use super::*;

    #[test]
    fn an_older_cluster_document_gives_grants_and_not_what_devices_are() {
        let grant =
            |cpu_millicores| Grant { cpu_millicores, cores: vec![0], threads: 1, memory_bytes: 1 << 30 };
        let device = |environment: &str, driver: &str, cpu_millicores| DeviceSpec {
            id: DeviceId::new("local/torch:0").unwrap(),
            kind: Kind::new("cpu/torch").unwrap(),
            vendor: "cpu".into(),
            identity: "a processor".into(),
            engine: "torch".into(),
            device_string: "cpu".into(),
            environment: EnvironmentId::new("torch").unwrap(),
            environment_hash: Hash::of_bytes(environment.as_bytes()),
            framework_version: environment.into(),
            driver: Some(driver.into()),
            memory_bytes: 0,
            host_resource: "cpu".into(),
            grant: grant(cpu_millicores),
        };
        let node = |device| NodeSpec {
            name: NodeId::new("local").unwrap(),
            cores: 2,
            memory_bytes: 8 << 30,
            isolation: Isolation::Affinity,
            devices: vec![device],
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cluster.toml");
        let older = ClusterSpec { format: ClusterSpec::FORMAT, nodes: vec![node(device("1", "1", 300))] };
        std::fs::write(&path, older.to_toml()).unwrap();
        let inventory = Inventory { nodes: vec![node(device("2", "2", 900))], unusable: Vec::new() };
        let cluster = read_cluster(&path, &inventory).unwrap();
        assert_eq!(cluster.nodes, [node(device("2", "2", 300))]);
    }
}
