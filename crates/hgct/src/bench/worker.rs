//! `hgct bench worker`: the worker without Python under hgct against a plain Burn loop of the same
//! model, which its program brings, pair by pair.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args;
use hgct_core::canonical;
use hgct_core::cluster::DeviceSpec;
use hgct_core::ids::{DeviceId, Rank, RunId};
use hgct_core::plan::{Plan, PlanBuilder, PlanRank};
use serde::Serialize;

use super::figures::Figure;
use super::training::{DATA, job, speed, train_alone};
use crate::environments::Environments;
use crate::job::{LoadedJob, PreparedData};
use crate::output::print;
use crate::plain_loops::PlainLoop;
use crate::session::{Session, with_grants};
use crate::stages::{Choices, Fleet};
use crate::train::{AgentArgs, session_options};
use crate::workspace::Workspace;

/// The engine of the worker without Python.
const ENGINE: &str = crate::vendors::NATIVE;

/// `hgct bench worker`
#[derive(Debug, Args)]
#[command(after_help = "Example:
  hgct bench worker local/burn:0 --rounds 3

Needs root: both are held to the same grant by control groups.")]
pub(crate) struct WorkerArgs {
    /// The device; none: the first Vulkan adapter
    #[arg(value_name = "DEVICE")]
    device: Option<DeviceId>,
    /// Pairs of measurements
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Samples of 256 tokens a micro-batch
    #[arg(long, default_value_t = 1)]
    micro_batch: u32,
    /// Micro-batches a step
    #[arg(long, default_value_t = 4)]
    micro_batches: u32,
    /// Text to train on
    #[arg(long, value_name = "PATH", default_value = DATA)]
    data: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    agents: AgentArgs,
}

/// `hgct bench worker --json`
#[derive(Debug, Serialize)]
struct WorkerBench {
    measured_at: String,
    device: DeviceId,
    kind: String,
    cpu_quota: f64,
    /// Under hgct and plain, tokens a second.
    tokens_per_second: Figure,
    plain_tokens_per_second: Figure,
    /// hgct ÷ plain, pair by pair.
    of_plain: Figure,
    /// Time to read all gradients once ÷ time of a plain step.
    read_back_of_step: f64,
}

impl std::fmt::Display for WorkerBench {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rate = |figure: &Figure| format!("{:.1} ({:.1}–{:.1})", figure.median, figure.min, figure.max);
        writeln!(f, "{} ({}), {:.2} cores, {}", self.device, self.kind, self.cpu_quota, self.measured_at)?;
        writeln!(f, "under hgct  {} tokens/s", rate(&self.tokens_per_second))?;
        writeln!(f, "plain loop  {} tokens/s", rate(&self.plain_tokens_per_second))?;
        let Figure { median, min, max } = self.of_plain;
        writeln!(f, "hgct ÷ plain {:.1} % ({:.1}–{:.1})", 100.0 * median, 100.0 * min, 100.0 * max)?;
        write!(f, "reading all gradients back: {:.2} % of a step", 100.0 * self.read_back_of_step)
    }
}

pub(crate) fn run(workspace: &Workspace, args: &WorkerArgs) -> Result<u8> {
    if args.micro_batch == 0 || args.micro_batches == 0 || args.rounds == 0 {
        bail!("--rounds, --micro-batch and --micro-batches must be at least 1");
    }
    let loaded = job(workspace, &args.data, Some(args.micro_batch * args.micro_batches))?;
    let data = loaded.prepare_data(workspace)?;
    let run = RunId::new(format!("{}-bench-{}", crate::date::stamp(), std::process::id()))?;
    let folder = workspace.root().join("sessions").join(run.as_str());
    let mut session = Session::open(workspace, &session_options(run, folder, &args.agents))?;
    let result = measure(workspace, args, &loaded, &data, &mut session);
    let closed = session.close();
    let bench = result?;
    closed?;
    print(&if args.json { canonical::encode(&bench) } else { format!("{bench}\n") })?;
    Ok(0)
}

fn measure(
    workspace: &Workspace,
    args: &WorkerArgs,
    loaded: &LoadedJob,
    data: &PreparedData,
    session: &mut Session,
) -> Result<WorkerBench> {
    let (mut fleet, _) = Fleet::discover(session, &Choices::default())?;
    let device = choose(&fleet.devices(), args.device.as_ref())?;
    for node in &mut fleet.cluster.nodes {
        node.devices.retain(|one| one.id == device.id);
    }
    // Alone it may have what the others would get.
    fleet.cluster = with_grants(fleet.cluster.nodes.clone())?;
    let device = choose(&fleet.devices(), Some(&device.id))?;
    fleet.start(session, std::slice::from_ref(&device))?;
    fleet.hold(session)?;
    let meta = &data.prepared.meta;
    session.offer(&[(meta.train.sha256.clone(), data.prepared.train_path())])?;
    let plan = plan(&fleet, &device, loaded, args)?;
    let shape = [plan.seq_len, args.micro_batch, args.micro_batches];
    let mut plain = plain_loop(workspace, &device, data, shape)?;
    plain.hold(&device)?;
    let tokens = f64::from(plan.global_batch * plan.seq_len);
    let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let one = (device.clone(), plan);
    for round in 0..args.rounds {
        let steps = train_alone(loaded, data, session, std::slice::from_ref(&one), Duration::from_secs(12))?;
        let steps = steps.get(&device.id).with_context(|| format!("{} did not train", device.id))?;
        ours.push(speed(steps));
        plain.order(1, steps.len() as u64)?;
        let seconds = plain.answer()?.seconds;
        theirs.push(tokens * seconds.len() as f64 / seconds.iter().sum::<f64>());
        ratios.push(ours[round] / theirs[round]);
        eprintln!("pair {} of {}: {:.1} %", round + 1, args.rounds, 100.0 * ratios[round]);
    }
    let figure = |values| Figure::of(values).context("no pair was measured");
    let plain_tokens_per_second = figure(theirs)?;
    plain.tell("read-back 9")?;
    let read_back = figure(plain.answer()?.seconds)?;
    Ok(WorkerBench {
        measured_at: crate::date::now(),
        device: device.id.clone(),
        kind: device.kind.to_string(),
        cpu_quota: f64::from(device.grant.cpu_millicores) / 1000.0,
        tokens_per_second: figure(ours)?,
        read_back_of_step: read_back.median * plain_tokens_per_second.median / tokens,
        plain_tokens_per_second,
        of_plain: figure(ratios)?,
    })
}

fn choose(devices: &[DeviceSpec], wanted: Option<&DeviceId>) -> Result<DeviceSpec> {
    let mut adapters = devices.iter().filter(|device| device.engine == ENGINE);
    let found = adapters.find(|device| wanted.is_none_or(|wanted| device.id == *wanted));
    found.cloned().ok_or_else(|| match wanted {
        Some(id) => anyhow!("{id} is no Vulkan adapter that can be used: see `hgct devices`"),
        None => anyhow!("no Vulkan adapter can be used: run `make vulkan`, then see `hgct devices`"),
    })
}

fn plan(fleet: &Fleet, device: &DeviceSpec, loaded: &LoadedJob, args: &WorkerArgs) -> Result<Plan> {
    let node =
        fleet.cluster.devices().find(|(_, one)| one.id == device.id).map(|(node, _)| node.name.clone());
    let rank = PlanRank {
        device: device.id.clone(),
        kind: device.kind.clone(),
        node: node.with_context(|| format!("{} has no node", device.id))?,
        grant: device.grant.clone(),
    };
    let layers = loaded.model.num_placeable_layers();
    let batch = args.micro_batch * args.micro_batches;
    let plan = PlanBuilder::new(loaded.model.clone(), loaded.job.recipe.seq_len, batch)
        .rank(rank)
        .pipeline(args.micro_batch, args.micro_batches, &[(Rank(0), layers)])
        .build()?;
    Ok(plan)
}

/// Starts the plain loop of the device's program.
fn plain_loop(
    workspace: &Workspace,
    device: &DeviceSpec,
    data: &PreparedData,
    shape: [u32; 3],
) -> Result<PlainLoop> {
    let environments = Environments::read(&workspace.root().join("environments.toml"))?;
    let environment = environments
        .get(&device.environment)
        .ok_or_else(|| anyhow!("no environment {}", device.environment))?;
    let mut command = environment.command(&BTreeMap::new(), device.grant.threads);
    command
        .args(["--plain", &device.device_string])
        .arg(workspace.root().join("bench/training/config.json").canonicalize()?)
        .arg(data.prepared.train_path().canonicalize()?)
        .args(shape.map(|number| number.to_string()));
    PlainLoop::of(&mut command, &device.grant.cores)
}
