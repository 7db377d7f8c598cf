//! `hgct plan`: of a job on devices that are here, or of any model on any cluster from documents alone.

mod document;
mod job;
mod problem;
mod search;
mod tables;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use hgct_core::canonical::{self, Hash};
use hgct_core::dtype::DType;
use hgct_core::plan::Plan;
use hgct_planner::answer::{Answer, Expected, TimeOver, Why, compare, limited_by, shortage, why};
use hgct_planner::instance::{Instance, Layout, Priced, Schedule, check, lost_nodes, price};
use hgct_planner::wide::{Effort, Found, Replayed, Way, replan, replay};
use hgct_planner::words::{count, rate, seconds};
use hgct_planner::{Planned, executable};
use serde_json::{Value, json};

use crate::commands::PlanArgs;
use crate::train::{AgentArgs, DeviceArgs};
use crate::workspace::{Workspace, write_atomically};
use problem::{Documents, Problem};
use search::Clock;

/// Arguments that only `--model` takes account of. What a call would pass over in silence is refused.
const OF_DOCUMENTS: [&str; 10] = [
    "model",
    "tables",
    "table_devices",
    "global_batch",
    "seq_len",
    "precision",
    "micro_batches",
    "time_limit",
    "explain",
    "accelerators",
];

/// Arguments of a call that measures devices.
const OF_DEVICES: [&str; 7] =
    ["force", "fresh", "agents", "no_local_agent", "listen", "token_file", "gather"];

/// `hgct plan`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hgct plan job.toml --output plan.json
  hgct plan --cluster cluster.toml --model config.json --global-batch 1024 --seq-len 4096
  hgct plan --cluster cluster.toml --model config.json --global-batch 1024 --seq-len 4096 --explain -o plan.json
  hgct plan --tables DIR --devices A100-40=32,V100-16=96 --model OPT-350 --global-batch 1024
  hgct plan --compare first.json second.json
  hgct plan --parent plan.json --lose h800-7 -o next.json

With --model no device is needed: see docs/planning.md.

Exit codes: 0 there is a plan; 2 bad input, or the model fits nowhere.")]
pub(crate) struct Args {
    /// The job to plan for, on devices that are measured
    #[arg(conflicts_with_all = OF_DOCUMENTS)]
    job: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Write the plan to this file too
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Plan from this profile; nothing is measured and no device is needed (with --cluster)
    #[arg(long, value_name = "FILE", requires = "cluster", conflicts_with_all = ["seq_len", "precision", "accelerators"], conflicts_with_all = OF_DEVICES)]
    profile: Option<PathBuf>,
    #[command(flatten)]
    large: Large,
    /// Compare two plans of --model
    #[arg(long, num_args = 2, value_names = ["FIRST", "SECOND"], conflicts_with_all = OF_DOCUMENTS, conflicts_with_all = OF_DEVICES, conflicts_with_all = ["job", "cluster", "profile", "output"])]
    compare: Vec<PathBuf>,
    /// Plan on from this plan of --model after a loss
    #[arg(long, value_name = "FILE", requires = "lose", conflicts_with_all = OF_DOCUMENTS, conflicts_with_all = OF_DEVICES, conflicts_with_all = ["job", "compare", "cluster", "profile"])]
    parent: Option<PathBuf>,
    /// Nodes that are lost, GROUP-INDEX
    #[arg(long, value_name = "NODE,…", value_delimiter = ',', requires = "parent", conflicts_with_all = OF_DOCUMENTS, conflicts_with_all = ["job", "compare"])]
    lose: Vec<String>,
    /// Steps for which the new plan is to be used: the fewer, the less it is worth to move
    #[arg(long, value_name = "N", requires = "parent", default_value_t = 1000, conflicts_with_all = OF_DOCUMENTS, conflicts_with_all = ["job", "compare"])]
    steps: u64,
    #[command(flatten)]
    devices: DeviceArgs,
    #[command(flatten)]
    agents: AgentArgs,
}

/// A problem from documents.
#[derive(Debug, clap::Args)]
pub(crate) struct Large {
    /// Plan this model (a Hugging Face config.json) on the groups of --cluster, or one of --tables by name
    #[arg(long, value_name = "MODEL", requires = "global_batch", conflicts_with_all = OF_DEVICES)]
    model: Option<PathBuf>,
    /// Plan from tables of measured layers (profiles.json, network.json) in this folder
    #[arg(long, value_name = "DIR", requires_all = ["model", "table_devices"], conflicts_with_all = ["cluster", "profile", "seq_len", "precision", "accelerators"])]
    tables: Option<PathBuf>,
    /// Devices of --tables, such as A100-40=32,V100-16=96
    #[arg(long = "devices", value_name = "KIND=COUNT,…", requires = "tables")]
    table_devices: Option<String>,
    /// Samples a step
    #[arg(long, value_name = "N", requires = "model", allow_negative_numbers = true)]
    global_batch: Option<u32>,
    /// Tokens a sample [default: 4096, or what the model allows]
    #[arg(long, value_name = "N", requires = "model", allow_negative_numbers = true)]
    seq_len: Option<u32>,
    /// Dtype of arithmetic: bf16, f16 or f32
    #[arg(long, value_name = "DTYPE", default_value = "bf16", value_parser = problem::precision)]
    precision: DType,
    /// Samples a micro-batch may have, such as 1,2,4 [default: 1 to 16 by twos]
    #[arg(long, value_name = "N,…", value_delimiter = ',', requires = "model")]
    micro_batches: Vec<u32>,
    /// Schedules that pipelines may have beside 1f1b: zero-bubble, interleaved-2, … [default: zero-bubble]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', requires = "model", conflicts_with_all = ["tables", "profile"])]
    schedules: Vec<Schedule>,
    /// Search for this long in all, and print the best plan and how far from the best possible it may be
    #[arg(long, value_name = "SECONDS", requires = "model", allow_negative_numbers = true)]
    time_limit: Option<f64>,
    /// Search for what was rejected and what more devices, memory and bandwidth would bring, too
    #[arg(long, requires = "model")]
    explain: bool,
    /// Force tensor parallelism over nodes of two unlike kinds in pairs, and say what that costs
    #[arg(long, value_name = "KIND+KIND", requires = "model", conflicts_with = "profile")]
    mixed_tensor_parallel: Option<String>,
    /// Folder of accelerator files beside or in place of the built-in ones
    #[arg(long, value_name = "DIR", requires = "model")]
    accelerators: Option<PathBuf>,
}

impl Args {
    /// Whether only documents are read: no device, no agent.
    pub(crate) fn only_documents(&self) -> bool {
        self.job.is_none() || self.profile.is_some()
    }
}

/// Plans, or compares plans.
pub(crate) fn run(dir: &Path, args: &Args) -> Result<u8> {
    if let [first, second] = args.compare.as_slice() {
        return compare_files(first, second, args.json);
    }
    if let Some(parent) = &args.parent {
        return after_loss(args, parent);
    }
    match (&args.job, &args.large.model) {
        (Some(job), _) => {
            let measured = PlanArgs {
                job: job.clone(),
                json: args.json,
                output: args.output.clone(),
                devices: args.devices.clone(),
                agents: args.agents.clone(),
            };
            job::plan(&Workspace::open(dir)?, &measured, args.profile.as_deref())
        }
        (None, Some(model)) => from_documents(args, model),
        (None, None) => bail!(
            "there is nothing to plan: give a job.toml, or --model with --cluster (or --tables); see hgct plan --help"
        ),
    }
}

fn from_documents(args: &Args, model: &Path) -> Result<u8> {
    let mut problem = match (&args.large.tables, &args.large.table_devices, &args.devices.cluster) {
        (Some(dir), Some(devices), _) => Problem::from_tables(&args.large, dir, devices, model)?,
        (_, _, Some(cluster)) => Problem::read(&args.large, cluster, model, args.profile.as_deref())?,
        _ => bail!("--model needs --cluster, or --tables with --devices"),
    };
    let free = match &args.large.mixed_tensor_parallel {
        Some(kinds) => {
            let free = problem.instance.clone();
            problem.mix(kinds)?;
            Some((kinds, free))
        }
        None => None,
    };
    let clock = Clock::new(args.large.time_limit, args.large.explain || free.is_some())?;
    let started = Instant::now();
    // What does not fit at any rate need not be searched for.
    if let Some(shortage) = shortage(&problem.instance) {
        bail!("the model fits nowhere: {shortage}");
    }
    let mut found = clock.search(&problem.instance)?;
    // A time limit is for the search; measured plans are simulated as `hgct train` executes them.
    let may_replay = args.large.time_limit.is_none() && problem.measured.is_none();
    let replayed = may_replay.then(|| replay(&problem.instance, &mut found)).flatten();
    let search_seconds = started.elapsed().as_secs_f64();
    let alone = alone(&problem.instance, &found);
    let (best, plan) = match &problem.measured {
        Some(documents) => as_executed(documents, &problem.instance, &found)?,
        None => (found.best, None),
    };
    let Some((layout, priced)) = best else {
        bail!("{}", no_plan(found.finished, args.large.time_limit.is_some()));
    };
    let ends = problem.slow.zip(problem.fast).map(|(slow, fast)| Box::new([slow, fast]));
    let [slow_s, fast_s] = at_ends(ends.as_deref(), &layout);
    let answer = Answer {
        format: Answer::FORMAT,
        parent: None,
        basis: problem.basis,
        model: problem.model,
        peaks: problem.peaks,
        confidence: problem.confidence,
        layout,
        groups: None,
        instance: problem.instance,
        ends,
        prediction: Expected {
            iteration_s: priced.iteration_s,
            slow_s,
            fast_s,
            bound_s: Some(found.proven_s),
            prices: found.bound.prices,
            limited_by: found.limited_by,
            finished: found.finished,
        },
        plan,
    };
    // What a search finds is the best price, which simulations may have given up a little of.
    let given_up = replayed.map_or(1.0, |of| of.best_price_s / answer.prediction.iteration_s);
    let mut again = |changed: &Instance| Ok(clock.quick(changed)?.map(|rate| rate * given_up));
    let forced = free.map(|(kinds, free)| forced(kinds, &answer, again(&free)));
    let mut why = why(&answer, &alone, if args.large.explain { Some(&mut again) } else { None });
    why.reasons.extend(replayed.as_ref().and_then(Replayed::reason));
    let hint = if args.large.explain { "" } else { "More reasons, by searching again: --explain.\n" };
    print(args, &answer, &why, search_seconds, forced, hint)
}

/// One step of a layout at both ends of what is known, where there are such.
fn at_ends(ends: Option<&[Instance; 2]>, layout: &Layout) -> [Option<f64>; 2] {
    let step = |end: &Instance| check(end, layout).is_empty().then(|| price(end, layout).iteration_s);
    ends.map_or([None; 2], |ends| ends.each_ref().map(step))
}

/// What tensor parallelism over unlike kinds costs, as text and as data.
fn forced(
    kinds: &str,
    answer: &Answer,
    free: Result<Option<f64>, TimeOver>,
) -> (String, &'static str, Value) {
    let own = answer.iterations_per_s();
    let cost = |free: f64| 1.0 - own / free;
    let against = match free {
        Ok(Some(free)) => format!(", {:.1} % less than the {} without", 100.0 * cost(free), rate(free)),
        Ok(None) => "; without it no plan was found".to_owned(),
        Err(TimeOver) => "; what it costs was not searched for, because the time was over".to_owned(),
    };
    let text =
        format!("Tensor parallelism over {kinds} was forced: {} iterations a second{against}\n", rate(own));
    let mut data = json!({
        "kinds": kinds,
        "iterations_per_second": own,
        "iterations_per_second_without": free.ok().flatten(),
        "cost": free.ok().flatten().map(cost),
    });
    if free.is_err() {
        data["left_out"] = true.into();
    }
    (text, "forced", data)
}

/// A layout with its price, and as a plan.
type Executed = (Option<(Layout, Priced)>, Option<Box<Plan>>);

/// The layout of those found that is the fastest as workers run it, with its plan. Where none of them
/// fits into what workers need beside the model, the first says why.
fn as_executed(documents: &Documents, instance: &Instance, found: &Found) -> Result<Executed> {
    let alone = found.alternatives.iter().filter_map(|row| row.best.as_ref());
    let mut best: Option<(u64, (Layout, Priced), Plan)> = None;
    let mut refused = None;
    for candidate in found.best.iter().chain(alone) {
        match executable(&documents.input(), instance, &candidate.0) {
            Ok(Planned { plan, explanation, .. }) => {
                if best.as_ref().is_none_or(|(step_ns, ..)| explanation.step_ns < *step_ns) {
                    best = Some((explanation.step_ns, candidate.clone(), plan));
                }
            }
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    match (best, refused) {
        (Some((_, candidate, plan)), _) => Ok((Some(candidate), Some(Box::new(plan)))),
        (None, Some(error)) => Err(error.into()),
        (None, None) => Ok((None, None)),
    }
}

/// Iterations a second of each pool alone, where the search tried all of them.
fn alone(instance: &Instance, found: &Found) -> Vec<Option<f64>> {
    let of_pool = |pool: usize| {
        let row = found.alternatives.iter().find(|row| row.pools == [pool])?;
        Some(row.best.as_ref().map(|(_, priced)| 1.0 / priced.iteration_s))
    };
    (0..instance.pools.len()).map(of_pool).collect::<Option<_>>().unwrap_or_default()
}

/// Plans on without some nodes.
fn after_loss(args: &Args, parent: &Path) -> Result<u8> {
    let parent = read_answer(parent)?;
    let lost: Vec<_> = lost_nodes(&parent.instance, &args.lose)?.into_iter().collect();
    let nodes: u64 = parent.instance.pools.iter().map(|pool| u64::from(pool.nodes)).sum();
    if lost.len() as u64 == nodes {
        bail!("`--lose` names every node that there is: nothing is left to plan for");
    }
    let started = Instant::now();
    let found = replan(
        &parent.instance,
        &parent.layout,
        parent.groups.as_deref(),
        &lost,
        args.steps,
        &Effort::default(),
    );
    let found = found.map_err(|faults| search::unsound(&faults))?;
    let search_seconds = started.elapsed().as_secs_f64();
    let Some(best) = found.ways.first() else {
        bail!(
            "without {} the model fits nowhere: add devices, or plan anew for what is left",
            args.lose.join(", ")
        );
    };
    let mut ends = parent.ends.clone();
    for end in ends.iter_mut().flat_map(|ends| ends.iter_mut()) {
        for (pool, left) in end.pools.iter_mut().zip(&found.instance.pools) {
            pool.nodes = left.nodes;
        }
    }
    let [slow_s, fast_s] = at_ends(ends.as_deref(), &best.layout);
    let anew = found.anew.as_ref();
    let alone = anew.map(|anew| alone(&found.instance, anew)).unwrap_or_default();
    let answer = Answer {
        parent: Some(Hash::of(&parent)),
        layout: best.layout.clone(),
        groups: Some(best.groups.clone()),
        prediction: Expected {
            iteration_s: best.priced.iteration_s,
            slow_s,
            fast_s,
            bound_s: anew.map(|anew| anew.proven_s),
            prices: anew.map(|anew| anew.bound.prices.clone()).unwrap_or_default(),
            limited_by: limited_by(&best.priced).to_owned(),
            finished: anew.is_none_or(|anew| anew.finished),
        },
        instance: found.instance,
        ends,
        // Its ranks and owners are of the devices before the loss.
        plan: None,
        ..parent
    };
    let mut text = format!("Without {}: it was {} a step\n", args.lose.join(", "), seconds(found.before_s));
    let ways: Vec<Value> = found.ways.iter().map(|way| told(way, &mut text)).collect();
    let ways =
        json!({ "lost": args.lose, "before_seconds": found.before_s, "steps": args.steps, "ways": ways });
    print(args, &answer, &why(&answer, &alone, None), search_seconds, Some((text, "replanned", ways)), "")
}

/// A way to go on, as a line and as data.
fn told(way: &Way, text: &mut String) -> Value {
    use std::fmt::Write as _;
    let _ = writeln!(
        text,
        "  {:<5} {} a step; {} stay as they are, {:.1} GB to move in {}",
        way.name,
        seconds(way.priced.iteration_s),
        count(way.kept_pipelines, "pipeline"),
        way.moved_bytes / 1e9,
        seconds(way.moved_s)
    );
    json!({
        "name": way.name,
        "iteration_seconds": way.priced.iteration_s,
        "kept_pipelines": way.kept_pipelines,
        "moved_bytes": way.moved_bytes,
        "moving_seconds": way.moved_s,
        "total_seconds": way.total_s,
    })
}

/// Writes the plan to its file and prints it; what more there is to say stands before it, or under a
/// key of its own.
fn print(
    args: &Args,
    answer: &Answer,
    why: &Why,
    search_seconds: f64,
    more: Option<(String, &'static str, Value)>,
    hint: &str,
) -> Result<u8> {
    if let Some(path) = &args.output {
        write_atomically(path, canonical::encode(answer).as_bytes(), 0o644)?;
    }
    let text = if args.json {
        let mut document = document::of_answer(answer, why, search_seconds);
        if let Some((_, key, data)) = more {
            document[key] = data;
        }
        canonical::encode(&document)
    } else {
        let more = more.map_or_else(String::new, |(text, ..)| format!("{text}\n"));
        format!("{more}{}{hint}Searched for {}.\n", answer.tell(why), seconds(search_seconds))
    };
    crate::output::print(&text)?;
    Ok(0)
}

/// Why there is no plan, where the sums of memory would allow one.
fn no_plan(finished: bool, limited: bool) -> &'static str {
    match (finished, limited) {
        (true, _) => {
            "the model fits nowhere: all devices together would hold it, but no division into pipelines was found \
             that does; use devices with more memory, a smaller micro-batch, or a larger cluster"
        }
        (false, true) => "the search was ended before it had a plan: give it a larger --time-limit",
        (false, false) => {
            "the search found no plan within its budget: give it a --time-limit of a minute or more"
        }
    }
}

fn compare_files(first: &Path, second: &Path, json: bool) -> Result<u8> {
    let [a, b] = [read_answer(first)?, read_answer(second)?];
    let compared = compare(&a, &b);
    let text = if json { canonical::encode(&compared) } else { compared.to_string() };
    crate::output::print(&text)?;
    Ok(0)
}

/// Reads a plan that `--model` wrote.
pub(crate) fn read_answer(path: &Path) -> Result<Answer> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let answer = Answer::from_json(&path.to_string_lossy(), &text);
    answer.with_context(|| format!("{} is no plan of `hgct plan --model`", path.display()))
}
