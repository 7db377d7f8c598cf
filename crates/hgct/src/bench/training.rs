//! `hgct bench training`: four stacks under quotas, alone and together.
//!
//! Quotas stand in for four kinds of card of unequal speed; all threads of a worker are held to its
//! quota by a control group of its own. In each round the kinds first train alone, all side by side
//! (so they share caches and memory as they do together, but exchange nothing), then together under
//! each plan. Efficiency is the ratio of the two, round by round.
//!
//! The global batch is not given by the comparison, but the number of micro-batches is limited; so
//! of the batches that keep to the limit, the one is taken that whole micro-batches divide best.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use clap::{Args, ValueEnum};
use hgct_control::coordinator::{Command, LoadSpec, Update};
use hgct_control::message::{FromWorker, StepReport, ToWorker, WorkerOptions};
use hgct_core::cluster::{ClusterSpec, DeviceSpec, Isolation};
use hgct_core::ids::{DeviceId, RunId};
use hgct_core::plan::Plan;
use hgct_core::profile::Profile;
use hgct_core::timeline::Timeline;
use hgct_planner::simulate_free_communication;

use super::candidates::{
    Candidate, alone_plans, candidates, divided_best, quotas, shortened, that_count, with_software,
};
use super::credit::Spenders;
use super::figures::{Figure, KindRow, Losses, PlanRow, TrainingBench, flop_shares};
use crate::job::{LoadedJob, PreparedData};
use crate::plain_loops::{Part, PlainLoop};
use crate::session::Session;
use crate::stages::{Choices, Fleet};
use crate::train::{AgentArgs, session_options};
use crate::workspace::{Workspace, write_atomically};

/// The text where none is named: the sources of the crates that hgct was built from.
pub(super) const DATA: &str = "crates:Cargo.lock";

/// How far a kind's CPU share may be off its quota before a round is void.
const SHARE_TOLERANCE: f64 = 0.02;

/// A quarter of a core needs seconds for one large micro-batch, and a software adapter minutes.
const PROFILE_BUDGET: Duration = Duration::from_secs(110);
const SOFTWARE_PROFILE_BUDGET: Duration = Duration::from_secs(200);

/// `hgct bench training`
#[derive(Debug, Args)]
#[command(after_help = "Example:
  hgct bench training --rounds 5 --json

Needs root: quotas are held by control groups.

Exit codes: 0 it was measured; 1 a worker or an agent was lost; 2 bad input, or it cannot be measured here.")]
pub(crate) struct TrainingArgs {
    /// Rounds that count
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one)]
    rounds: usize,
    /// Steps a plan and round, after one that does not count
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Samples of 256 tokens a step; without it the number that micro-batches divide best
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    global_batch: Option<u32>,
    /// Only the planner's choice, and no plain loop
    #[arg(long)]
    quick: bool,
    /// One more kind, with a quota of its own; a software adapter stands outside of every rule
    #[arg(long, value_name = "KIND")]
    with: Option<With>,
    /// Text to train on
    #[arg(long, value_name = "PATH", default_value = DATA)]
    data: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Keep the result in this folder
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    #[command(flatten)]
    agents: AgentArgs,
}

/// What can be measured beside the four.
#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum With {
    Vulkan,
}

pub(crate) fn run(workspace: &Workspace, args: &TrainingArgs) -> Result<u8> {
    let loaded = job(workspace, &args.data, args.global_batch)?;
    let data = loaded.prepare_data(workspace)?;
    let run = RunId::new(format!("{}-bench-{}", crate::date::stamp(), std::process::id()))?;
    let folder = workspace.root().join("sessions").join(run.as_str());
    let mut session = Session::open(workspace, &session_options(run, folder, &args.agents))?;
    let result = measure(workspace, args, &loaded, &data, &mut session);
    let closed = session.close();
    let bench = result?;
    closed?;
    let name = format!("training-{}", &bench.measured_at[..10]);
    super::deliver(&bench, &name, args.output.as_deref(), args.json)?;
    Ok(0)
}

/// The benchmark's job, with the data that was asked for.
pub(super) fn job(workspace: &Workspace, data: &str, global_batch: Option<u32>) -> Result<LoadedJob> {
    let folder = workspace.root().join("bench/training");
    let data = match data.split_once(':') {
        Some((scheme, path)) => format!("{scheme}:{}", absolute(path)?),
        None => absolute(data)?,
    };
    let mut text = include_str!("job.toml").replace("@DATA@", &data);
    if let Some(batch) = global_batch {
        text = text.replace("global_batch = 64", &format!("global_batch = {batch}"));
    }
    write_atomically(&folder.join("job.toml"), text.as_bytes(), 0o644)?;
    write_atomically(&folder.join("config.json"), include_bytes!("config.json"), 0o644)?;
    LoadedJob::read(&folder.join("job.toml"))
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|rounds| *rounds > 0).ok_or_else(|| "must be a whole number, at least 1".into())
}

fn absolute(path: &str) -> Result<String> {
    let path = std::fs::canonicalize(path)
        .with_context(|| format!("cannot find {path}: name a text with --data"))?;
    Ok(path.to_string_lossy().into_owned())
}

/// One step under a plan: the reports of all ranks.
type Step = Vec<StepReport>;

/// What one round gave.
struct Round {
    /// Tokens a second of each device alone, all side by side.
    alone: BTreeMap<DeviceId, f64>,
    /// Nanoseconds of exchange (the optimizer) a step of each device alone.
    alone_exchange_ns: BTreeMap<DeviceId, f64>,
    /// Counted steps of each candidate.
    together: Vec<Vec<Step>>,
}

fn measure(
    workspace: &Workspace,
    args: &TrainingArgs,
    loaded: &LoadedJob,
    data: &PreparedData,
    session: &mut Session,
) -> Result<TrainingBench> {
    let (mut fleet, _) = Fleet::discover(session, &Choices::default())?;
    fleet.cluster = quotas(fleet.cluster, args.with == Some(With::Vulkan))?;
    let devices = fleet.devices();
    fleet.start(session, &devices)?;
    fleet.require_one()?;
    fleet.hold(session)?;
    if fleet.cluster.nodes.iter().any(|node| node.isolation != Isolation::Cgroup) {
        bail!("the benchmark needs control groups for its quotas: run it as root ({})", fleet.isolation_note);
    }
    let mut loaded = loaded.clone();
    let has_software = that_count(&fleet.cluster) != fleet.cluster;
    let mut profile_budget = PROFILE_BUDGET;
    if has_software {
        // Larger micro-batches would take it minutes each.
        loaded.job.policy.micro_batches[0] = 1;
        profile_budget = SOFTWARE_PROFILE_BUDGET;
    }
    let choices = Choices { fresh: true, profile_budget, ..Choices::default() };
    let profile = fleet.profile(session, workspace, &loaded.job, &loaded.model, &choices)?;
    if fleet.devices().len() < devices.len() {
        bail!("a kind that is to be compared could not be measured: the reason stands above");
    }
    let counted = that_count(&fleet.cluster);
    let meta = &data.prepared.meta;
    session.offer(&[(meta.train.sha256.clone(), data.prepared.train_path())])?;
    if args.global_batch.is_none() {
        loaded.job.recipe.global_batch = divided_best(&loaded, &counted, &profile);
    }
    let loaded = &loaded;
    let mut candidates = candidates(loaded, &counted, &profile, args.quick)?;
    if has_software {
        candidates.push(with_software(loaded, &fleet.cluster, &profile)?);
    }
    let alone: Vec<(DeviceSpec, Plan)> = alone_plans(loaded, &fleet.cluster, &profile)?;

    let spenders = Spenders::start(&fleet.cluster)?;
    let mut rounds = Vec::new();
    let mut void_rounds = 0;
    while rounds.len() < args.rounds {
        if void_rounds > 2 * args.rounds {
            bail!("{void_rounds} rounds were void: something else uses these cores");
        }
        let round = round(args, loaded, data, session, &candidates, &alone)?;
        let (off, who) = worst_share(&round, &candidates);
        if off > SHARE_TOLERANCE {
            eprintln!("round void: the CPU share of {who} is off by {:.1} %", 100.0 * off);
            void_rounds += 1;
            continue;
        }
        eprintln!("round {} of {}", rounds.len() + 1, args.rounds);
        rounds.push(round);
    }
    let rule: Vec<_> =
        alone.iter().filter(|(device, _)| counted.device(&device.id).is_some()).cloned().collect();
    let one_by_one = if args.quick { None } else { Some(one_after_another(loaded, data, session, &rule)?) };
    // Neither side of the next comparison waits, and only one of them would share its quota.
    drop(spenders);
    let overhead = if args.quick { None } else { overhead(workspace, args, loaded, data, session, &alone)? };
    figures(args, &fleet.cluster, &profile, &candidates, &rounds, void_rounds, one_by_one, overhead)
}

fn round(
    args: &TrainingArgs,
    loaded: &LoadedJob,
    data: &PreparedData,
    session: &mut Session,
    candidates: &[Candidate],
    alone: &[(DeviceSpec, Plan)],
) -> Result<Round> {
    let budget = Duration::from_secs(12);
    let mut own = train_alone(loaded, data, session, alone, budget)?;
    let mut together = Vec::new();
    for candidate in candidates {
        let timeline = candidate.planned.timeline.clone();
        together.push(train_plan(args.steps, loaded, data, session, &candidate.plan, timeline)?);
        if together.len() == 1 {
            // The host's speed drifts within a round: the first, which is the planner's choice, is
            // compared with what was before and what comes after.
            for (device, steps) in train_alone(loaded, data, session, alone, budget)? {
                own.entry(device).or_default().extend(steps);
            }
        }
    }
    let exchange = |steps: &[StepReport]| {
        steps.iter().map(|step| step.exchange_ns as f64).sum::<f64>() / steps.len() as f64
    };
    Ok(Round {
        alone: own.iter().map(|(device, steps)| (device.clone(), speed(steps))).collect(),
        alone_exchange_ns: own.iter().map(|(device, steps)| (device.clone(), exchange(steps))).collect(),
        together,
    })
}

/// All devices train alone at the same time; the counted steps of each.
pub(super) fn train_alone(
    loaded: &LoadedJob,
    data: &PreparedData,
    session: &mut Session,
    alone: &[(DeviceSpec, Plan)],
    budget: Duration,
) -> Result<BTreeMap<DeviceId, Vec<StepReport>>> {
    let requests = alone
        .iter()
        .map(|(device, plan)| {
            let order = ToWorker::TrainAlone {
                plan: Box::new(plan.clone()),
                recipe: loaded.job.recipe.clone(),
                train_tokens: data.prepared.meta.train.sha256.clone(),
                warm_up_steps: 1,
                budget_ns: budget.as_nanos() as u64,
            };
            (device.id.clone(), order)
        })
        .collect();
    let deadline = Duration::from_secs(300);
    session.shell.command(Command::Ask { requests, deadline_ns: deadline.as_nanos() as u64 })?;
    let mut found = BTreeMap::new();
    let failed =
        session.wait_for("training alone", deadline + Duration::from_secs(5), |update| match update {
            Update::Answer { worker, answer: FromWorker::TrainedAlone { steps } } => {
                found.insert(worker, steps);
                None
            }
            Update::Answered { failed } => Some(failed),
            _ => None,
        })?;
    match failed.into_iter().next() {
        None => Ok(found),
        Some((device, failure)) => bail!("{device} could not train alone: {failure}"),
    }
}

/// `steps` steps of a plan after one that does not count; reports of each, by rank.
pub(super) fn train_plan(
    steps: u64,
    loaded: &LoadedJob,
    data: &PreparedData,
    session: &mut Session,
    plan: &Plan,
    timeline: Timeline,
) -> Result<Vec<Vec<StepReport>>> {
    let deadline = Duration::from_secs(300);
    session.shell.command(Command::Load(Box::new(LoadSpec {
        plan: plan.clone(),
        timeline: Some(timeline),
        recipe: loaded.job.recipe.clone(),
        train_tokens: data.prepared.meta.train.sha256.clone(),
        held_out_tokens: None,
        options: WorkerOptions {
            shared_memory: true,
            wire_delay_ns: 0,
            step_deadline_ns: deadline.as_nanos() as u64,
            timeline_every: 0,
            final_checkpoint: false,
        },
        deadline_ns: deadline.as_nanos() as u64,
    })))?;
    session.wait_for("loaded stages", deadline, |update| {
        matches!(update, Update::Loaded { .. }).then_some(())
    })?;
    session.shell.command(Command::Start {
        step: 0,
        num_updates: 0,
        end_step: steps + 1,
        deadline_ns: deadline.as_nanos() as u64,
    })?;
    let mut counted = Vec::new();
    session.wait_for("the last step", Duration::from_secs(600), |update| match update {
        Update::StepCommitted { step, reports } => {
            if step > 0 {
                counted.push(reports);
            }
            None
        }
        Update::Finished { .. } => Some(()),
        _ => None,
    })?;
    Ok(counted)
}

/// Each kind alone while the others are idle.
fn one_after_another(
    loaded: &LoadedJob,
    data: &PreparedData,
    session: &mut Session,
    alone: &[(DeviceSpec, Plan)],
) -> Result<f64> {
    let mut sum = 0.0;
    for one in alone {
        let steps = train_alone(loaded, data, session, std::slice::from_ref(one), Duration::from_secs(10))?;
        sum += steps.values().map(|steps| speed(steps)).sum::<f64>();
    }
    Ok(sum)
}

/// 1 − hgct ÷ plain PyTorch, pair by pair, all else idle.
fn overhead(
    workspace: &Workspace,
    args: &TrainingArgs,
    loaded: &LoadedJob,
    data: &PreparedData,
    session: &mut Session,
    alone: &[(DeviceSpec, Plan)],
) -> Result<Option<f64>> {
    let Some(torch) = alone.iter().find(|(device, _)| device.engine == "torch") else { return Ok(None) };
    let torch = (torch.0.clone(), shortened(&torch.1)?);
    let part = Part::of_one(&torch.1);
    let tokens_file = data.prepared.train_path();
    let mut plain = PlainLoop::start_held(workspace, &torch.0, &loaded.model, &tokens_file, &part)?;
    let tokens = f64::from(torch.1.global_batch * torch.1.seq_len);
    let mut ratios = Vec::new();
    // Short sides in many pairs: what drifts between the two of a pair is little.
    for _ in 0..2 * args.rounds {
        let ours = train_alone(loaded, data, session, std::slice::from_ref(&torch), Duration::from_secs(8))?;
        let ours = ours.values().map(|steps| speed(steps)).sum::<f64>();
        plain.order(1, 2)?;
        let seconds = plain.answer()?.seconds;
        let theirs = tokens * seconds.len() as f64 / seconds.iter().sum::<f64>();
        ratios.push(1.0 - ours / theirs);
    }
    Ok(Figure::of(ratios).map(|figure| figure.median))
}

/// Tokens a second over all steps.
pub(super) fn speed(steps: &[StepReport]) -> f64 {
    let tokens: u64 = steps.iter().map(|step| step.num_tokens).sum();
    let ns: u64 = steps.iter().map(|step| step.step_ns).sum();
    tokens as f64 * 1e9 / ns as f64
}

/// A kind's CPU time over the wall time of its compute actions, as a part of its quota.
fn share_of_quota(steps: &[Step], rank: usize, plan: &Plan) -> f64 {
    let cpu: u64 = steps.iter().map(|step| step[rank].compute_cpu_ns).sum();
    let wall: u64 = steps.iter().map(|step| step[rank].compute_ns).sum();
    cpu as f64 / wall.max(1) as f64 * 1000.0 / f64::from(plan.ranks[rank].grant.cpu_millicores)
}

/// How far the worst kind's share is off in any row, and whose it is.
fn worst_share(round: &Round, candidates: &[Candidate]) -> (f64, String) {
    let mut worst = (0f64, String::new());
    for (candidate, steps) in candidates.iter().zip(&round.together).filter(|(one, _)| !one.outside) {
        for (rank, placed) in candidate.plan.ranks.iter().enumerate() {
            let off = (share_of_quota(steps, rank, &candidate.plan) - 1.0).abs();
            if off > worst.0 {
                worst = (off, format!("{} under {}", placed.device, candidate.name));
            }
        }
    }
    worst
}

#[allow(clippy::too_many_arguments, reason = "everything that was measured, once")]
fn figures(
    args: &TrainingArgs,
    cluster: &ClusterSpec,
    profile: &Profile,
    candidates: &[Candidate],
    rounds: &[Round],
    void_rounds: usize,
    one_by_one: Option<f64>,
    worker_overhead: Option<f64>,
) -> Result<TrainingBench> {
    let none = || anyhow!("no round counts");
    let mut plans = Vec::new();
    let mut rows = Vec::new();
    let mut pipeline_of_dry_run = None;
    for (at, candidate) in candidates.iter().enumerate() {
        let plan = &candidate.plan;
        let tokens = f64::from(plan.global_batch) * f64::from(plan.seq_len);
        let step_s = |round: &Round| {
            let steps = &round.together[at];
            let longest = |step: &Step| step.iter().map(|r| r.step_ns).max().unwrap_or(0) as f64 / 1e9;
            steps.iter().map(longest).sum::<f64>() / steps.len() as f64
        };
        let step = Figure::of(rounds.iter().map(step_s).collect()).ok_or_else(none)?;
        let efficiency =
            Figure::of(rounds.iter().map(|r| tokens / step_s(r) / alone_sum(candidate, r)).collect())
                .ok_or_else(none)?;
        let predicted = candidate.planned.plan.prediction.as_ref().map_or(0.0, |p| p.step_ns as f64 / 1e9);
        let losses: Vec<Losses> =
            rounds.iter().map(|round| losses(candidate, round, at, step_s(round))).collect();
        let mean = |part: fn(&Losses) -> f64| losses.iter().map(part).sum::<f64>() / losses.len() as f64;
        plans.push(PlanRow {
            plan: candidate.name.clone(),
            tokens_per_second: Figure::of(rounds.iter().map(|r| tokens / step_s(r)).collect())
                .ok_or_else(none)?,
            efficiency,
            step_seconds: step,
            predicted_step_seconds: predicted,
            prediction_error: (predicted - step.median).abs() / step.median,
            losses: Losses {
                rounding: mean(|l| l.rounding),
                exchange: mean(|l| l.exchange),
                waiting: mean(|l| l.waiting),
                unexplained: mean(|l| l.unexplained),
            },
        });
        if plan.pipelines.len() == 1 && plan.pipelines[0].stages.len() > 1 && !candidate.outside {
            let free = simulate_free_communication(plan, profile)?;
            pipeline_of_dry_run = Some(free.step_ns as f64 / 1e9 / step.median);
        }
        let shares = flop_shares(plan);
        for (rank, placed) in plan.ranks.iter().enumerate() {
            let together = Figure::of(rounds.iter().map(|r| tokens * shares[rank] / step_s(r)).collect())
                .ok_or_else(none)?;
            let alone =
                Figure::of(rounds.iter().filter_map(|r| r.alone.get(&placed.device).copied()).collect())
                    .ok_or_else(none)?;
            let quota =
                Figure::of(rounds.iter().map(|r| share_of_quota(&r.together[at], rank, plan)).collect())
                    .ok_or_else(none)?;
            rows.push(KindRow {
                plan: candidate.name.clone(),
                kind: placed.kind.clone(),
                tokens_per_second_alone: alone.median,
                tokens_per_second_together: together.median,
                of_its_own: together.median / alone.median,
                cpu_quota: f64::from(placed.grant.cpu_millicores) / 1000.0,
                cpu_share_of_quota: quota.median,
            });
        }
    }
    let planner = plans.first().ok_or_else(none)?;
    let machine =
        cluster.devices().next().map(|(node, device)| format!("{} ({} cores)", device.identity, node.cores));
    Ok(TrainingBench {
        measured_at: crate::date::now(),
        command: format!(
            "hgct bench training --rounds {} --steps {} --global-batch {}{}",
            args.rounds,
            args.steps,
            candidates.first().map_or(0, |candidate| candidate.plan.global_batch),
            if args.with.is_some() { " --with vulkan" } else { "" }
        ),
        machine: machine.unwrap_or_default(),
        efficiency: planner.efficiency.median,
        efficiency_one_after_another: one_by_one.map(|sum| planner.tokens_per_second.median / sum),
        prediction_error: rule(&plans, candidates).map(|row| row.prediction_error).fold(0.0, f64::max),
        worker_overhead,
        pipeline_of_dry_run,
        rounds: rounds.len(),
        void_rounds,
        plans,
        rows,
    })
}

/// The rows for which the rules are made.
fn rule<'a>(plans: &'a [PlanRow], candidates: &'a [Candidate]) -> impl Iterator<Item = &'a PlanRow> {
    plans.iter().zip(candidates).filter(|(_, candidate)| !candidate.outside).map(|(row, _)| row)
}

/// Tokens a second, alone and side by side, of all devices that a plan could use.
fn alone_sum(candidate: &Candidate, round: &Round) -> f64 {
    candidate.among.iter().filter_map(|device| round.alone.get(device)).sum()
}

/// Where a step of a plan falls short of the kinds' summed speed, as shares of the step.
fn losses(candidate: &Candidate, round: &Round, at: usize, step_s: f64) -> Losses {
    let plan = &candidate.plan;
    let tokens = f64::from(plan.global_batch) * f64::from(plan.seq_len);
    let ideal = tokens / alone_sum(candidate, round);
    let shares = flop_shares(plan);
    let own = |rank: usize| {
        tokens * shares[rank] / round.alone.get(&plan.ranks[rank].device).copied().unwrap_or(f64::INFINITY)
    };
    // The rank that has most to do at its own speed.
    let busiest = (0..plan.ranks.len()).max_by(|a, b| own(*a).total_cmp(&own(*b))).unwrap_or(0);
    let steps = &round.together[at];
    let mean = |of: &dyn Fn(&StepReport) -> u64| {
        steps.iter().map(|step| of(&step[busiest]) as f64 / 1e9).sum::<f64>() / steps.len() as f64
    };
    let alone_exchange =
        round.alone_exchange_ns.get(&plan.ranks[busiest].device).copied().unwrap_or(0.0) / 1e9;
    let rounding = own(busiest) - ideal;
    let exchange = mean(&|r| r.exchange_ns) - alone_exchange;
    let waiting = mean(&|r| r.step_ns.saturating_sub(r.compute_ns + r.exchange_ns));
    let unexplained = step_s - ideal - rounding - exchange - waiting;
    Losses {
        rounding: rounding / step_s,
        exchange: exchange / step_s,
        waiting: waiting / step_s,
        unexplained: unexplained / step_s,
    }
}
