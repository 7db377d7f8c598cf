//! A coordinator with its agents and workers, as commands use it: discover, start, check, profile.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use hgct_control::auth::Token;
use hgct_control::coordinator::{Command, Config, Outcome, Update};
use hgct_control::detector::Verdict;
use hgct_control::message::{FromWorker, MAX_CHUNK, ToWorker, UnusableDevice, WorkerStart};
use hgct_core::canonical::Hash;
use hgct_core::check::CheckReport;
use hgct_core::cluster::{ClusterSpec, DeviceSpec, Isolation, NodeSpec};
use hgct_core::ids::{DeviceId, NodeId, RunId};
use hgct_core::model::ModelSpec;
use hgct_core::profile::{DeviceProfile, LinkProfile};

use crate::coordinator::Shell;
use crate::workspace::{Workspace, write_atomically};

/// How to bring a session up.
pub(crate) struct Options {
    /// The run.
    pub(crate) run: RunId,
    /// Folder of the run: token, logs.
    pub(crate) folder: PathBuf,
    /// Agents of other hosts to wait for.
    pub(crate) remote_agents: usize,
    /// Start an agent on this host.
    pub(crate) local_agent: bool,
    /// Where agents join.
    pub(crate) listen: SocketAddr,
    /// Token file to use; made where there is none.
    pub(crate) token_file: Option<PathBuf>,
    /// How long to wait for agents.
    pub(crate) gather: Duration,
    /// How long a worker may warm up.
    pub(crate) warming: Duration,
}

/// Most seconds that a command waits for anything: a day, which no clock overflows.
pub(crate) const MOST_SECONDS: u64 = 86_400;

/// Parser of a number of seconds to wait.
pub(crate) fn seconds() -> clap::builder::RangedU64ValueParser<u64> {
    clap::value_parser!(u64).range(..=MOST_SECONDS)
}

/// Parser of a number of agents, to which this host's is added.
pub(crate) fn agents() -> clap::builder::RangedU64ValueParser<u16> {
    clap::builder::RangedU64ValueParser::new().range(..=u64::from(u16::MAX))
}

/// Name of the node whose agent a command starts itself.
pub(crate) const LOCAL: &str = "local";

/// Devices that gave no answer, with the reason.
pub(crate) type Unanswered = Vec<(DeviceId, String)>;

/// What all nodes offer.
pub(crate) struct Inventory {
    /// The nodes with usable devices.
    pub(crate) nodes: Vec<NodeSpec>,
    /// What cannot be used, with its node.
    pub(crate) unusable: Vec<(NodeId, UnusableDevice)>,
}

/// A coordinator with its agents.
pub(crate) struct Session {
    pub(crate) shell: Shell,
    pub(crate) run: RunId,
    pub(crate) folder: PathBuf,
    nodes: Vec<NodeId>,
    agent: Option<Child>,
    /// Last known memory of each agent, bytes.
    pub(crate) agent_memory: BTreeMap<NodeId, u64>,
    /// Workers that are ready.
    ready: Vec<DeviceId>,
}

impl Session {
    /// Listens, starts this host's agent, and waits until all agents have joined.
    pub(crate) fn open(workspace: &Workspace, options: &Options) -> Result<Self> {
        let is_new = !options.folder.exists();
        fs::create_dir_all(options.folder.join("logs"))
            .with_context(|| format!("cannot make {}", options.folder.display()))?;
        let token_file = options.token_file.clone().unwrap_or_else(|| options.folder.join("token"));
        let token = read_or_make_token(&token_file)?;
        let agents = options.remote_agents + usize::from(options.local_agent);
        let mut config = Config::new(options.run.clone(), agents, options.gather.as_nanos() as u64);
        config.limits.warming_ns = options.warming.as_nanos() as u64;
        let shell = Shell::start(config, token, options.listen).inspect_err(|_| {
            // What never began is no run: `latest` must not find it.
            if is_new {
                let _ = fs::remove_dir_all(&options.folder);
            }
        })?;
        let mut session = Self {
            shell,
            run: options.run.clone(),
            folder: options.folder.clone(),
            nodes: Vec::new(),
            agent: None,
            agent_memory: BTreeMap::new(),
            ready: Vec::new(),
        };
        if options.local_agent {
            session.agent = Some(start_agent(workspace, &session, &token_file)?);
        }
        if options.remote_agents > 0 {
            eprintln!(
                "waiting for {} agents at {}; start each with: hgct agent --join {} --token-file FILE",
                options.remote_agents,
                session.shell.address(),
                session.shell.address()
            );
        }
        let wait = options.gather + Duration::from_secs(5);
        session.nodes = session.wait_for("agents", wait, |update| match update {
            Update::Gathered { nodes } => Some(nodes),
            _ => None,
        })?;
        Ok(session)
    }

    /// Asks all agents for their devices.
    pub(crate) fn discover(&mut self) -> Result<Inventory> {
        let deadline = Duration::from_secs(100);
        self.shell.command(Command::Discover { deadline_ns: deadline.as_nanos() as u64 })?;
        let (found, missing) = self.wait_for("devices", deadline + SLACK, |update| match update {
            Update::Inventory { nodes, missing } => Some((nodes, missing)),
            _ => None,
        })?;
        if let Some(node) = missing.first() {
            bail!("node {node} did not answer what devices it has");
        }
        let mut inventory = Inventory { nodes: Vec::new(), unusable: Vec::new() };
        for (node, unusable) in found {
            inventory.unusable.extend(unusable.into_iter().map(|device| (node.name.clone(), device)));
            inventory.nodes.push(node);
        }
        Ok(inventory)
    }

    /// Brings files to all agents, by content.
    pub(crate) fn offer(&mut self, files: &[(Hash, PathBuf)]) -> Result<()> {
        let mut blobs = Vec::new();
        for (hash, path) in files {
            let size = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len();
            blobs.push((hash.clone(), size));
        }
        let deadline = Duration::from_secs(600);
        let deadline_ns = deadline.as_nanos() as u64;
        self.shell.command(Command::OfferBlobs { blobs, nodes: Vec::new(), deadline_ns })?;
        loop {
            match self.next(deadline)? {
                Update::BlobNeeded { node, hash, offset } => {
                    let path = files.iter().find(|(known, _)| *known == hash).map(|(_, path)| path);
                    let path = path.ok_or_else(|| anyhow!("an agent asks for unknown content {hash}"))?;
                    self.send_file(&node, &hash, path, offset)?;
                }
                Update::BlobsHeld { missing } => match missing.first() {
                    None => return Ok(()),
                    Some((node, hash)) => bail!("node {node} did not get content {} in time", hash.short()),
                },
                _ => {}
            }
        }
    }

    fn send_file(&mut self, node: &NodeId, hash: &Hash, path: &Path, mut offset: u64) -> Result<()> {
        use std::os::unix::fs::FileExt as _;
        let file = fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        loop {
            let mut bytes = vec![0; MAX_CHUNK];
            let read = file
                .read_at(&mut bytes, offset)
                .with_context(|| format!("cannot read {}", path.display()))?;
            if read == 0 {
                return Ok(());
            }
            bytes.truncate(read);
            let (node, hash) = (node.clone(), hash.clone());
            self.shell.command(Command::BlobChunk { node, hash, offset, bytes })?;
            offset += read as u64;
        }
    }

    /// Starts workers; answers with those that are not ready, and why.
    pub(crate) fn start_workers(
        &mut self,
        devices: &[(NodeId, DeviceSpec)],
    ) -> Result<Vec<(DeviceId, String)>> {
        let workers = devices
            .iter()
            .map(|(node, device)| {
                let start = WorkerStart {
                    device: device.id.clone(),
                    environment: device.environment.clone(),
                    device_string: device.device_string.clone(),
                    grant: device.grant.clone(),
                };
                (node.clone(), start)
            })
            .collect();
        let deadline = Duration::from_secs(120);
        self.shell.command(Command::StartWorkers { workers, deadline_ns: deadline.as_nanos() as u64 })?;
        let (ready, failed) = self.wait_for("workers", deadline + SLACK, |update| match update {
            Update::WorkersStarted { ready, failed } => Some((ready, failed)),
            _ => None,
        })?;
        self.ready.extend(ready);
        Ok(failed.into_iter().map(|(device, failure)| (device, failure.to_string())).collect())
    }

    /// Ends workers.
    pub(crate) fn stop_workers(&mut self, workers: &[DeviceId]) -> Result<()> {
        if workers.is_empty() {
            return Ok(());
        }
        self.shell.command(Command::StopWorkers { workers: workers.to_vec() })?;
        self.ready.retain(|device| !workers.contains(device));
        self.wait_for("workers to end", Duration::from_secs(10), |update| match update {
            Update::WorkersStopped { .. } => Some(()),
            _ => None,
        })
    }

    /// Holds all workers to their grants from now on; answers how, node by node.
    pub(crate) fn hold_grants(&mut self) -> Result<BTreeMap<NodeId, (bool, String)>> {
        let deadline = Duration::from_secs(10);
        self.shell.command(Command::HoldGrants { deadline_ns: deadline.as_nanos() as u64 })?;
        self.wait_for("grants", deadline + SLACK, |update| match update {
            Update::GrantsHeld { nodes, .. } => Some(nodes),
            _ => None,
        })
    }

    /// Runs the conformance suite on devices, side by side; a device that gives no report has a
    /// reason.
    pub(crate) fn check(
        &mut self,
        devices: &[DeviceSpec],
        budget: Duration,
        told: &mut dyn FnMut(&CheckReport),
    ) -> Result<(Vec<CheckReport>, Unanswered)> {
        let order = |device: &DeviceSpec| ToWorker::Check {
            kind: device.kind.clone(),
            budget_ns: budget.as_nanos() as u64,
        };
        let mut reports = Vec::new();
        let failed = self.ask(devices, order, budget + SLACK, &mut |answer| {
            if let FromWorker::Checked { report } = answer {
                told(&report);
                reports.push(report);
            }
        })?;
        reports.sort_by(|a, b| a.device.cmp(&b.device));
        Ok((reports, failed))
    }

    /// Measures devices, all side by side.
    pub(crate) fn profile(
        &mut self,
        devices: &[DeviceSpec],
        model: &ModelSpec,
        seq_len: u32,
        micro_batches: &[u32],
        budget: Duration,
    ) -> Result<(Vec<DeviceProfile>, Unanswered)> {
        let order = |device: &DeviceSpec| ToWorker::Profile {
            model: model.clone(),
            seq_len,
            micro_batches: micro_batches.to_vec(),
            kind: device.kind.clone(),
            environment_hash: device.environment_hash.clone(),
            grant: device.grant.clone(),
            budget_ns: budget.as_nanos() as u64,
        };
        let mut rows = Vec::new();
        let failed = self.ask(devices, order, budget + 3 * SLACK, &mut |answer| {
            if let FromWorker::Profiled { profile } = answer {
                rows.push(profile);
            }
        })?;
        rows.sort_by(|a, b| a.device.cmp(&b.device));
        Ok((rows, failed))
    }

    /// Measures the links between workers.
    pub(crate) fn measure_links(&mut self, workers: &[DeviceId]) -> Result<Vec<LinkProfile>> {
        if workers.len() < 2 {
            return Ok(Vec::new());
        }
        let deadline = Duration::from_secs(60);
        self.shell.command(Command::MeasureLinks {
            workers: workers.to_vec(),
            deadline_ns: deadline.as_nanos() as u64,
        })?;
        let (links, failed) = self.wait_for("links", deadline + SLACK, |update| match update {
            Update::LinksMeasured { links, failed } => Some((links, failed)),
            _ => None,
        })?;
        match failed.into_iter().next() {
            None => Ok(links),
            Some((device, failure)) => bail!("{device} could not measure its links: {failure}"),
        }
    }

    /// One request to each of several workers; `answered` hears the answers.
    pub(crate) fn ask(
        &mut self,
        devices: &[DeviceSpec],
        order: impl Fn(&DeviceSpec) -> ToWorker,
        deadline: Duration,
        answered: &mut dyn FnMut(FromWorker),
    ) -> Result<Vec<(DeviceId, String)>> {
        if devices.is_empty() {
            return Ok(Vec::new());
        }
        let requests = devices.iter().map(|device| (device.id.clone(), order(device))).collect();
        self.shell.command(Command::Ask { requests, deadline_ns: deadline.as_nanos() as u64 })?;
        let failed = self.wait_for("answers", deadline + SLACK, |update| match update {
            Update::Answer { answer, .. } => {
                answered(answer);
                None
            }
            Update::Answered { failed } => Some(failed),
            _ => None,
        })?;
        Ok(failed.into_iter().map(|(device, failure)| (device, failure.to_string())).collect())
    }

    /// The next update, with what every command does about some of them done.
    pub(crate) fn next(&mut self, within: Duration) -> Result<Update> {
        let update = self.shell.update(within)?;
        self.note(&update);
        Ok(update)
    }

    /// Logs and memory figures, whatever the command waits for.
    pub(crate) fn note(&mut self, update: &Update) {
        match update {
            Update::AgentAlive { node, memory_bytes } => {
                let most = self.agent_memory.entry(node.clone()).or_default();
                *most = (*most).max(*memory_bytes);
            }
            Update::Log { worker, text } => self.log(worker, text),
            Update::WorkerGone { worker, failure } => {
                self.ready.retain(|device| device != worker);
                self.log(worker, &format!("hgct: {failure}\n"));
            }
            Update::Suspect { verdict } => suspect(verdict),
            _ => {}
        }
    }

    fn log(&self, worker: &DeviceId, text: &str) {
        use std::io::Write as _;
        let path = self.folder.join("logs").join(format!("{}.log", worker.as_str().replace(['/', ':'], "-")));
        let file = fs::OpenOptions::new().create(true).append(true).open(path);
        // A log that cannot be written must not end a run.
        let _ = file.and_then(|mut file| file.write_all(text.as_bytes()));
    }

    /// Waits for what `wanted` makes of an update.
    pub(crate) fn wait_for<T>(
        &mut self,
        what: &str,
        within: Duration,
        mut wanted: impl FnMut(Update) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("no {what} within {} s", within.as_secs());
            }
            let Some(update) = self.shell.poll(left)? else { continue };
            self.note(&update);
            if let Some(found) = wanted(update) {
                return Ok(found);
            }
        }
    }

    /// Ends agents and workers and waits until they are gone.
    pub(crate) fn close(self) -> Result<Outcome> {
        let Self { shell, agent, .. } = self;
        let outcome = shell.end();
        if let Some(mut agent) = agent {
            wait_for_exit(&mut agent, Duration::from_secs(5));
        }
        outcome
    }
}

/// What a machine and the wire may take on top of a deadline that the other side keeps.
const SLACK: Duration = Duration::from_secs(5);

/// Gives every device its grant by policy.
pub(crate) fn with_grants(mut nodes: Vec<NodeSpec>) -> Result<ClusterSpec> {
    let policy = crate::grants::Policy::new(&crate::vendors::load(None)?);
    for node in &mut nodes {
        crate::grants::assign(node, &policy);
    }
    let cluster = ClusterSpec { format: ClusterSpec::FORMAT, nodes };
    cluster.validate("the discovered cluster")?;
    Ok(cluster)
}

/// The least isolation of all nodes.
pub(crate) fn isolation(cluster: &ClusterSpec) -> Isolation {
    cluster.nodes.iter().map(|node| node.isolation).max().unwrap_or(Isolation::Unisolated)
}

fn read_or_make_token(path: &Path) -> Result<Token> {
    if path.exists() {
        return crate::agent::read_token(path).map_err(Into::into);
    }
    let mut random = [0; 32];
    getrandom::fill(&mut random).map_err(|error| anyhow!("no randomness: {error}"))?;
    let token = Token::from_random(&random);
    write_atomically(path, token.to_file().as_bytes(), 0o600)?;
    Ok(token)
}

/// This host's own agent: the same program, another process.
fn start_agent(workspace: &Workspace, session: &Session, token_file: &Path) -> Result<Child> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let log =
        fs::File::create(session.folder.join("logs/agent.log")).context("cannot make the agent's log")?;
    std::process::Command::new(program)
        .arg("agent")
        .args(["--join", &session.shell.address().to_string(), "--name", LOCAL, "--token-file"])
        .arg(token_file)
        // Workers of other hosts reach this host's where its agents reach the coordinator.
        .args(["--listen", &session.shell.address().ip().to_string()])
        .arg("--dir")
        .arg(workspace.root())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        // Ctrl-C is the coordinator's to hear: the agent must live until the last step is done.
        .process_group(0)
        .spawn()
        .context("cannot start the agent of this host")
}

/// Says who is late, before anybody is given up.
fn suspect(verdict: &Verdict) {
    let (who, silent_ns) = match verdict {
        Verdict::AgentSuspect { node, silent_ns } => (format!("the agent of {node}"), silent_ns),
        Verdict::WorkerSuspect { worker, silent_ns } => (format!("the worker of {worker}"), silent_ns),
        // Those are given up, and told as the cause of the run's end.
        _ => return,
    };
    eprintln!("hgct: {who} has said nothing for {:.1} s", *silent_ns as f64 / 1e9);
}

fn wait_for_exit(child: &mut Child, within: Duration) {
    let deadline = Instant::now() + within;
    while Instant::now() < deadline {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
}
