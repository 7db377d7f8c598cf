//! Which devices this host offers: vendor files say how hardware shows itself, environments which
//! frameworks there are, and a probe in a child process whether the one drives the other.
//!
//! ```text
//! vendor file ─► hardware (driver, PCI, tool) ─┐
//!                                              ├─► probe each pair ─► confirm ─► devices, or why not
//! environments.toml ───────────────────────────┘
//! ```
//!
//! A framework's device string proves nothing, since many vendors answer to `cuda`. What it answers
//! counts only when the device's PCI address or UUID is one of the vendor's cards, or else when the
//! vendor's own library, and no other vendor's, is in its process.

mod confirm;
mod hardware;
mod host;
mod probe;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hgct_control::message::UnusableDevice;
use hgct_core::cluster::{DeviceSpec, Grant, NodeSpec};
use hgct_core::ids::{DeviceId, EnvironmentId, Kind, NodeId};
use serde::Serialize;

pub(crate) use host::allowed_cores;
pub(crate) use table::{Args, run};

use crate::environments::{self, Environment, Environments};
use crate::grants::isolation;
use crate::vendors::{self, EngineUse, Vendor};
use confirm::confirm;
use hardware::{Card, Hardware};
use host::Host;
use probe::{Answer, Cache};

/// Result of this module.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// What keeps discovery from an answer; everything else is a line of the answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Error {
    /// The vendor files are wrong.
    #[error(transparent)]
    Vendors(#[from] vendors::Error),
    /// The table of environments is missing or wrong.
    #[error(transparent)]
    Environments(#[from] environments::Error),
    /// A name that is made of others does not serve as one.
    #[error(transparent)]
    Name(#[from] hgct_core::Error),
}

/// Where to look, and for how long.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// The node's name in ids.
    pub(crate) node: NodeId,
    /// Where the host's file system begins: `/`, but for tests.
    pub(crate) root: PathBuf,
    /// The table of environments.
    pub(crate) environments: PathBuf,
    /// A folder of vendor files over the built-in ones.
    pub(crate) vendors: Option<PathBuf>,
    /// A folder for answers; `None`: ask always.
    pub(crate) cache: Option<PathBuf>,
    /// How long one framework may take to answer.
    pub(crate) deadline: Duration,
}

impl Options {
    /// The usual places under `folder` (`.hgct`).
    pub(crate) fn new(node: NodeId, folder: &Path) -> Self {
        Self {
            node,
            root: "/".into(),
            environments: folder.join("environments.toml"),
            vendors: None,
            cache: Some(folder.join("cache/devices")),
            deadline: Duration::from_mins(1),
        }
    }
}

/// What a host offers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Discovery {
    /// The node with the devices that can be used. Grants are not assigned yet: each has all.
    pub(crate) node: NodeSpec,
    /// What the node's document has no place for, by device.
    pub(crate) details: BTreeMap<DeviceId, Detail>,
    /// What cannot be used, and why.
    pub(crate) unusable: Vec<UnusableDevice>,
}

/// What is needed to show a device and to start its worker.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Detail {
    /// Version of the interpreter.
    pub(crate) python: String,
    /// Plug-ins to import with the framework.
    pub(crate) modules: Vec<String>,
    /// Variables of a worker over those of its environment.
    pub(crate) variables: BTreeMap<String, String>,
    /// What the vendor file says was verified.
    pub(crate) verified: String,
}

/// Probes this host.
pub(crate) fn discover(options: &Options) -> Result<Discovery> {
    let environments = Environments::read(&options.environments)?;
    let vendors = vendors::load(options.vendors.as_deref())?;
    let host = Host::look(&options.root);
    let mut present: Vec<Present> = vendors
        .iter()
        .filter_map(|vendor| {
            let hardware = if vendor.recognise.processor {
                let card = Card { name: Some(host.processor.clone()), ..Card::default() };
                Some(Hardware { cards: vec![card], driver: host.kernel.clone(), problem: None })
            } else if vendor.recognise.adapters {
                // Only its worker can look; where that is not installed, nothing is missed.
                let installed = environments.iter().any(|env| vendor.engine(&env.engine).is_some());
                installed.then(Hardware::default)
            } else {
                hardware::find(&options.root, vendor)
            };
            hardware.map(|hardware| Present { vendor, hardware })
        })
        .collect();
    // A card that its vendor's own stack drives is not offered again as an adapter.
    present.sort_by_key(|here| here.vendor.recognise.adapters);
    let mut found = Findings::new(options, &host, &environments);
    let mut pairs = Vec::new();
    for here in &present {
        if let Some(problem) = &here.hardware.problem {
            found.set_aside(here.vendor.title.clone(), None, &here.vendor.name, problem.clone())?;
            continue;
        }
        let drivers = environments.iter().filter_map(|env| Some((env, here.vendor.engine(&env.engine)?)));
        let drivers: Vec<_> = drivers.collect();
        if drivers.is_empty() {
            let wanted = here.vendor.engines.iter().map(needs).collect::<Vec<_>>().join(", or ");
            let reason = format!("no environment drives it: one with {wanted} would");
            found.set_aside(here.vendor.title.clone(), None, &here.vendor.name, reason)?;
        }
        for (environment, driven) in drivers {
            if let Some(reason) = &environment.unusable {
                let kind = format!("{}/{}", here.vendor.name, environment.engine);
                found.set_aside(pair_name(here, environment), Some(environment), &kind, reason.clone())?;
            } else {
                let variables = variables(here, driven, &present);
                pairs.push(Pair { here, environment, driven, variables });
            }
        }
    }
    // All at once: most of an import is waiting for the disk, and a hanging one costs no other.
    let answers: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> = pairs.iter().map(|pair| scope.spawn(|| pair.answer(options))).collect();
        running.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    });
    for (pair, answer) in pairs.iter().zip(answers) {
        let answer = answer.unwrap_or_else(|_| Err("the probe failed inside of hgct".into()));
        found.settle(pair, &answer, &present)?;
    }
    Ok(found.finish())
}

/// A vendor whose hardware is here.
struct Present<'a> {
    vendor: &'a Vendor,
    hardware: Hardware,
}

/// A vendor's hardware and an environment that may drive it.
struct Pair<'a> {
    here: &'a Present<'a>,
    environment: &'a Environment,
    driven: &'a EngineUse,
    variables: BTreeMap<String, String>,
}

impl Pair<'_> {
    fn answer(&self, options: &Options) -> Result<Answer, String> {
        let hash = self.environment.hash();
        let key = Cache::key(&hash, &(self.driven, &self.here.hardware, &self.variables));
        let name = format!("{}-{}.json", hash.short(), self.here.vendor.name);
        let cache = Cache { folder: options.cache.as_deref() };
        // Drivers come and go without a trace in what answers are kept by, and their adapters answer
        // within a second.
        let keeps = !self.here.vendor.recognise.adapters;
        // Who wants an environment deleted wants it gone, whatever is kept.
        if keeps
            && self.environment.interpreter.exists()
            && let Some(answer) = cache.get(&name, &key)
        {
            return Ok(answer);
        }
        let answer = probe::ask(self.environment, self.driven, &self.variables, options.deadline)?;
        if keeps && let Err(error) = cache.put(&name, key, &answer) {
            eprintln!("hgct: the answer of {} is not kept: {error}", self.environment.name);
        }
        Ok(answer)
    }
}

/// Devices and set-asides as they come in.
struct Findings<'a> {
    options: &'a Options,
    host: &'a Host,
    environments: &'a Environments,
    node: NodeSpec,
    details: BTreeMap<DeviceId, Detail>,
    unusable: Vec<UnusableDevice>,
    /// Who offers a piece of hardware already.
    offered: BTreeMap<String, DeviceId>,
    /// How many devices an environment offers already.
    counted: BTreeMap<EnvironmentId, u32>,
}

impl<'a> Findings<'a> {
    fn new(options: &'a Options, host: &'a Host, environments: &'a Environments) -> Self {
        let node = NodeSpec {
            name: options.node.clone(),
            cores: host.cores.len() as u32,
            memory_bytes: host.memory_bytes,
            isolation: isolation().0,
            devices: Vec::new(),
        };
        let (details, unusable) = (BTreeMap::new(), Vec::new());
        let (offered, counted) = (BTreeMap::new(), BTreeMap::new());
        Self { options, host, environments, node, details, unusable, offered, counted }
    }

    fn set_aside(
        &mut self,
        name: String,
        environment: Option<&Environment>,
        kind: &str,
        reason: String,
    ) -> Result<()> {
        let environment = environment.map(|environment| environment.name.clone());
        self.unusable.push(UnusableDevice { name, kind: Kind::new(kind)?, environment, reason });
        Ok(())
    }

    fn settle(
        &mut self,
        pair: &Pair<'_>,
        answer: &Result<Answer, String>,
        present: &[Present<'_>],
    ) -> Result<()> {
        let kind = format!("{}/{}", pair.here.vendor.name, pair.environment.engine);
        let name = pair_name(pair.here, pair.environment);
        let answer = match answer {
            Ok(answer) => answer,
            Err(reason) => return self.set_aside(name, Some(pair.environment), &kind, reason.clone()),
        };
        for seen in &answer.devices {
            let others: Vec<_> = present.iter().map(|here| here.vendor).collect();
            let card = match confirm(pair.here.vendor, &pair.here.hardware, &others, seen, &answer.libraries)
            {
                Ok(card) => card,
                Err(reason) => {
                    self.set_aside(device_name(pair, seen), Some(pair.environment), &kind, reason)?;
                    continue;
                }
            };
            self.offer(pair, answer, seen, &card, present)?;
        }
        Ok(())
    }

    fn offer(
        &mut self,
        pair: &Pair<'_>,
        answer: &Answer,
        seen: &probe::Seen,
        card: &Card,
        present: &[Present<'_>],
    ) -> Result<()> {
        let (vendor, environment) = (pair.here.vendor, pair.environment);
        let kind = Kind::new(self.kind_name(vendor, environment, seen, card))?;
        let counted = self.counted.get(&environment.name).copied().unwrap_or(0);
        let id = DeviceId::new(format!("{}/{}:{counted}", self.options.node, environment.name))?;
        // Stacks on the processor share it, which grants arrange; a card has one driver.
        let (identity, host_resource, memory_bytes) = if vendor.recognise.processor || seen.software {
            (self.host.processor.clone(), "cpu".to_owned(), 0)
        } else {
            let identity =
                card.identity().map_or_else(|| format!("{}#{}", vendor.name, seen.index), str::to_owned);
            let set = |name: &str| std::env::var_os(name).is_some();
            let why_not = self
                .is_taken(pair, seen, card, &identity)
                .or_else(|| withheld(pair, card, present, set).filter(|_| !seen.asked_for));
            if let Some(reason) = why_not {
                return self.set_aside(device_name(pair, seen), Some(environment), kind.as_str(), reason);
            }
            for name in card.names().chain([identity.as_str()]) {
                self.offered.insert(name.to_owned(), id.clone());
            }
            let memory = card.memory_bytes.or(seen.memory_bytes).unwrap_or(0);
            (identity.clone(), identity, memory)
        };
        self.counted.insert(environment.name.clone(), counted + 1);
        let all = Grant {
            cpu_millicores: self.node.cores * 1000,
            cores: Vec::new(),
            threads: self.node.cores,
            memory_bytes: 0,
        };
        self.node.devices.push(DeviceSpec {
            id: id.clone(),
            kind,
            vendor: vendor.name.clone(),
            identity,
            engine: environment.engine.clone(),
            device_string: seen.device.clone(),
            environment: environment.name.clone(),
            environment_hash: environment.hash(),
            framework_version: answer.version.clone(),
            driver: seen.driver.clone().or_else(|| pair.here.hardware.driver.clone()),
            memory_bytes,
            host_resource,
            grant: all,
        });
        let detail = Detail {
            python: answer.python.clone(),
            modules: pair.driven.imports.clone(),
            variables: pair.variables.clone(),
            verified: vendor.verified.clone(),
        };
        self.details.insert(id, detail);
        Ok(())
    }

    /// Why this card is not offered once more, if another device is it. A user can ask for a second
    /// way to drive a card, but not for one way twice, as where a card has two Vulkan drivers.
    fn is_taken(&self, pair: &Pair<'_>, seen: &probe::Seen, card: &Card, identity: &str) -> Option<String> {
        let names = card.names().filter(|_| pair.here.vendor.recognise.adapters);
        let other = names.chain([identity]).find_map(|name| self.offered.get(name))?;
        let same_way =
            |device: &DeviceSpec| device.id == *other && device.environment == pair.environment.name;
        let refused = !seen.asked_for || self.node.devices.iter().any(same_way);
        refused.then(|| format!("{identity} is already offered as {other}"))
    }

    /// `HARDWARE/ENGINE`; where an engine has several environments on this host, those that are not
    /// named like it add their own name, since they are other stacks.
    fn kind_name(
        &self,
        vendor: &Vendor,
        environment: &Environment,
        seen: &probe::Seen,
        card: &Card,
    ) -> String {
        let called = card.name.as_deref().or(seen.name.as_deref()).unwrap_or("");
        let mut hardware = slug(&format!("{} {called}", vendor.name));
        let memory = card.memory_bytes.or(seen.memory_bytes);
        if let Some(memory) = memory.filter(|_| !vendor.recognise.processor && !hardware.contains("gb")) {
            hardware = format!("{hardware}-{}gib", memory.div_ceil(1 << 30));
        }
        let same = self.environments.iter().filter(|other| other.engine == environment.engine).count();
        let stack = if same > 1 { slug(environment.name.as_str()) } else { environment.engine.clone() };
        format!("{hardware}/{stack}")
    }

    fn finish(self) -> Discovery {
        Discovery { node: self.node, details: self.details, unusable: self.unusable }
    }
}

/// Why an adapter is left alone, if it is a card of a vendor whose own variable (as a batch system
/// sets it) is `set`: those cards that it allows are offered by the vendor's stack, others may be
/// somebody else's.
fn withheld(
    pair: &Pair<'_>,
    card: &Card,
    present: &[Present<'_>],
    set: impl Fn(&str) -> bool,
) -> Option<String> {
    if !pair.here.vendor.recognise.adapters {
        return None;
    }
    let owner = present.iter().find(|here| here.hardware.cards.iter().any(|known| known.is(card)))?;
    let variable = owner.vendor.engines.iter().filter_map(|driven| driven.visibility.as_deref());
    let (variable, ask) = (variable.into_iter().find(|name| set(name))?, pair.driven.visibility.as_deref()?);
    Some(format!("{variable} says which cards of {} may be used; {ask} can name it", owner.vendor.title))
}

/// `NVIDIA in torch cuda:1`: a device that cannot be used, for people. Nobody knows an adapter by its
/// ids alone.
fn device_name(pair: &Pair<'_>, seen: &probe::Seen) -> String {
    let name = format!("{} {}", pair_name(pair.here, pair.environment), seen.device);
    match &seen.name {
        Some(called) if pair.here.vendor.recognise.adapters => format!("{name} ({called})"),
        _ => name,
    }
}

/// `NVIDIA in torch`: a vendor and an environment, for people.
fn pair_name(here: &Present<'_>, environment: &Environment) -> String {
    format!("{} in {}", here.vendor.title, environment.name)
}

fn needs(driven: &EngineUse) -> String {
    if driven.imports.is_empty() {
        return driven.engine.clone();
    }
    format!("{} and {}", driven.engine, driven.imports.join(", "))
}

/// Variables under which a process sees this vendor's cards and no others: the vendor's own, then
/// empty visibility for the other vendors that are here, then what the user has set for this one.
fn variables(here: &Present<'_>, driven: &EngineUse, present: &[Present<'_>]) -> BTreeMap<String, String> {
    let mut variables = driven.variables.clone();
    if here.vendor.recognise.processor {
        return variables;
    }
    for other in present.iter().filter(|other| other.vendor.name != here.vendor.name) {
        let hidden = other.vendor.engine(&driven.engine).and_then(|engine| engine.visibility.as_ref());
        if let Some(name) = hidden.filter(|name| driven.visibility.as_ref() != Some(*name)) {
            variables.insert(name.clone(), String::new());
        }
    }
    if let Some(name) = &driven.visibility
        && let Ok(wanted) = std::env::var(name)
    {
        variables.insert(name.clone(), wanted);
    }
    variables
}

/// Lower-case words joined by `-`, each once in a row, without what processors' names add.
fn slug(text: &str) -> String {
    let text = text.split('@').next().unwrap_or(text).replace("(R)", " ").replace("(TM)", " ");
    let mut words: Vec<String> = Vec::new();
    let mut known = BTreeSet::new();
    for word in text.split(|c: char| !c.is_ascii_alphanumeric() && c != '.') {
        let word = word.to_ascii_lowercase();
        let filler = ["", "processor", "core", "with"].contains(&word.as_str()) || word.ends_with("-core");
        if !filler && known.insert(word.clone()) {
            words.push(word);
        }
    }
    words.join("-").chars().take(100).collect()
}

#[cfg(test)]
mod tests;
