//! `hgct bench memory`: what workers hold at most, against what the planner expects and what a plain
//! loop of the same framework, layers and micro-batches in flight takes.
//!
//! Two plans: each device alone with the whole model, and the planner's choice for all of them. The
//! workers are fresh ones each time, since a process hardly forgets what it once needed.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::Args;
use hgct_core::cluster::DeviceSpec;
use hgct_core::ids::{DeviceId, Kind, RunId};
use hgct_core::plan::Plan;
use hgct_core::profile::Profile;
use hgct_planner::cost::{DeviceCost, ModelShape, StageLoad};
use serde::Serialize;

use super::candidates::alone_plans;
use super::training;
use crate::job::{LoadedJob, PreparedData};
use crate::plain_loops;
use crate::session::Session;
use crate::stages::{Choices, Fleet};
use crate::train::{AgentArgs, make_plan, session_options};
use crate::workspace::Workspace;

/// `hgct bench memory`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  hgct bench memory
  hgct bench memory examples/quickstart/job.toml --json

Exit codes: 0 every worker is within its allowance; 1 one is not; 2 bad input.")]
pub(crate) struct MemoryArgs {
    /// The job whose model and plan are looked at; none: that of `hgct bench training`
    job: Option<PathBuf>,
    /// Steps of each plan
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Keep the result in this folder
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    #[command(flatten)]
    agents: AgentArgs,
}

/// `hgct bench memory --json`
#[derive(Debug, Serialize)]
struct MemoryBench {
    /// When.
    measured_at: String,
    /// The command that gives it again.
    command: String,
    /// Whether every worker that was compared is within its allowance.
    holds: bool,
    /// Largest |predicted − reached| ÷ reached.
    prediction_error: f64,
    /// One row a plan and device.
    rows: Vec<Row>,
}

/// One worker under one plan; bytes.
#[derive(Debug, Serialize)]
struct Row {
    plan: &'static str,
    device: DeviceId,
    kind: Kind,
    /// A worker whose framework has computed something, without a model.
    base_bytes: u64,
    /// What the planner expects.
    predicted_bytes: u64,
    /// Largest resident memory.
    worker_bytes: u64,
    /// The same of the plain loop, where there is one.
    plain_loop_bytes: Option<u64>,
    /// How much more than the plain loop is allowed.
    allowance_bytes: Option<u64>,
    holds: Option<bool>,
}

pub(crate) fn run(workspace: &Workspace, args: &MemoryArgs) -> Result<u8> {
    let loaded = match &args.job {
        Some(path) => LoadedJob::read(path)?,
        None => training::job(workspace, training::DATA, Some(32))?,
    };
    let data = loaded.prepare_data(workspace)?;
    let run = RunId::new(format!("{}-memory-{}", crate::date::stamp(), std::process::id()))?;
    let folder = workspace.root().join("sessions").join(run.as_str());
    let mut session = Session::open(workspace, &session_options(run, folder.clone(), &args.agents))?;
    let result = measure(workspace, args, &loaded, &data, &mut session);
    let closed = session.close();
    let bench = result?;
    closed?;
    std::fs::remove_dir_all(&folder)?;
    let name = format!("memory-{}-{}", loaded.job.name, &bench.measured_at[..10]);
    super::deliver(&bench, &name, args.output.as_deref(), args.json)?;
    Ok(u8::from(!bench.holds))
}

fn measure(
    workspace: &Workspace,
    args: &MemoryArgs,
    loaded: &LoadedJob,
    data: &PreparedData,
    session: &mut Session,
) -> Result<MemoryBench> {
    let (mut fleet, _) = Fleet::discover(session, &Choices::default())?;
    let profile = fleet.profile(session, workspace, &loaded.job, &loaded.model, &Choices::default())?;
    let meta = &data.prepared.meta;
    session.offer(&[(meta.train.sha256.clone(), data.prepared.train_path())])?;
    let tokens = data.prepared.train_path();
    let devices = fleet.devices();
    let mut rows = Vec::new();

    let alone: Vec<(DeviceSpec, Plan)> = alone_plans(loaded, &fleet.cluster, &profile)?;
    start_afresh(&mut fleet, session, &devices)?;
    let steps = training::train_alone(loaded, data, session, &alone, Duration::from_secs(2))?;
    for (device, plan) in &alone {
        let reached = steps[&device.id].iter().map(|step| step.memory_bytes).max();
        let plain = plain_loops::peaks(workspace, std::slice::from_ref(device), plan, &tokens)?;
        let predicted = expected_alone(plan, &profile, device)?;
        rows.push(row("alone", device, &profile, predicted, reached, &plain)?);
    }

    let planned = make_plan(loaded, &fleet.cluster, &profile)?;
    let plan = Arc::new(planned.plan);
    let used: Vec<DeviceSpec> = devices
        .iter()
        .filter(|device| plan.ranks.iter().any(|rank| rank.device == device.id))
        .cloned()
        .collect();
    start_afresh(&mut fleet, session, &used)?;
    let steps = training::train_plan(args.steps, loaded, data, session, &plan, planned.timeline)?;
    let plain = plain_loops::peaks(workspace, &used, &plan, &tokens)?;
    for (rank, placed) in plan.ranks.iter().enumerate() {
        let device = used.iter().find(|device| device.id == placed.device);
        let device = device.ok_or_else(|| anyhow!("{} is gone", placed.device))?;
        let reached = steps.iter().map(|step| step[rank].memory_bytes).max();
        let prediction = plan.prediction.as_ref().and_then(|p| p.ranks.get(rank));
        let predicted = prediction.map_or(0, |p| p.memory_bytes);
        rows.push(row("planner", device, &profile, predicted, reached, &plain)?);
    }

    let error = |row: &Row| {
        (row.predicted_bytes as f64 - row.worker_bytes as f64).abs() / row.worker_bytes.max(1) as f64
    };
    let job = args.job.as_ref().map_or_else(String::new, |job| format!(" {}", job.display()));
    Ok(MemoryBench {
        measured_at: crate::date::now(),
        command: format!("hgct bench memory{job} --steps {}", args.steps),
        holds: rows.iter().all(|row| row.holds != Some(false)),
        prediction_error: rows.iter().map(error).fold(0.0, f64::max),
        rows,
    })
}

/// New workers for these devices, and no others.
fn start_afresh(fleet: &mut Fleet, session: &mut Session, devices: &[DeviceSpec]) -> Result<()> {
    let running: Vec<DeviceId> = fleet.started.iter().cloned().collect();
    session.stop_workers(&running)?;
    fleet.started.clear();
    // No grants are held: memory does not depend on speed.
    fleet.start(session, devices)
}

/// What the planner's model expects of a device that trains the whole model alone.
fn expected_alone(plan: &Plan, profile: &Profile, device: &DeviceSpec) -> Result<u64> {
    let row = profile.device(&device.id).ok_or_else(|| anyhow!("{} was not measured", device.id))?;
    let shape = ModelShape::new(&plan.model, plan.seq_len);
    let load = StageLoad {
        layers: &(0..shape.num_layers),
        micro_batch: plan.pipelines[0].micro_batch,
        in_flight: 1,
        recompute: false,
        owned: shape.num_parameters(),
        num_holders: 1,
    };
    let memory = DeviceCost::new(row).memory(&shape, load, device.memory_bytes > 0);
    Ok(memory.map_or(0, hgct_planner::cost::Memory::total_bytes))
}

fn row(
    plan: &'static str,
    device: &DeviceSpec,
    profile: &Profile,
    predicted_bytes: u64,
    reached: Option<u64>,
    plain: &BTreeMap<DeviceId, u64>,
) -> Result<Row> {
    let worker_bytes = reached.ok_or_else(|| anyhow!("{} trained no step", device.id))?;
    let plain_loop_bytes = plain.get(&device.id).copied();
    let allowance_bytes = plain_loop_bytes.map(plain_loops::allowance_bytes);
    let holds = plain_loop_bytes.zip(allowance_bytes).map(|(plain, more)| worker_bytes <= plain + more);
    Ok(Row {
        plan,
        device: device.id.clone(),
        kind: device.kind.clone(),
        base_bytes: profile.device(&device.id).map_or(0, |row| row.base_memory_bytes),
        predicted_bytes,
        worker_bytes,
        plain_loop_bytes,
        allowance_bytes,
        holds,
    })
}

impl std::fmt::Display for MemoryBench {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mib = |bytes: u64| (bytes >> 20).to_string();
        let known = |bytes: Option<u64>| bytes.map_or_else(|| "–".into(), mib);
        writeln!(f, "{} · MiB, peaks", self.measured_at)?;
        writeln!(
            f,
            "\n{:<9} {:<18} {:>6} {:>10} {:>8} {:>11} {:>6} {:>8}",
            "plan", "device", "base", "predicted", "worker", "plain loop", "more", "allowed"
        )?;
        for row in &self.rows {
            let more = row.plain_loop_bytes.map(|plain| row.worker_bytes as i64 - plain as i64);
            writeln!(
                f,
                "{:<9} {:<18} {:>6} {:>10} {:>8} {:>11} {:>6} {:>8}{}",
                row.plan,
                row.device,
                mib(row.base_bytes),
                mib(row.predicted_bytes),
                mib(row.worker_bytes),
                known(row.plain_loop_bytes),
                more.map_or_else(|| "–".into(), |more| (more >> 20).to_string()),
                known(row.allowance_bytes),
                if row.holds == Some(false) { "  too much" } else { "" }
            )?;
        }
        writeln!(f, "\nlargest error of a prediction: {:.1} %", 100.0 * self.prediction_error)?;
        write!(f, "again: {}", self.command)
    }
}
