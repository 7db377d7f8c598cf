//! What can be done with a plan that is there: `hgct simulate`, `hgct export`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::builder::PossibleValuesParser;
use hgct_core::canonical;
use hgct_core::plan::Plan;
use hgct_core::profile::{Profile, Spread};
use hgct_core::timeline::Timeline;
use hgct_planner::answer::Answer;
use hgct_planner::export::{Exported, Target, export};
use hgct_planner::instance::{Group, Instance, Layout, Stage, check_instance, price};
use hgct_planner::scale::{SLOW_FACTORS, WhatIf, simulate_placed};
use hgct_planner::words::{count, nanoseconds, seconds};
use serde_json::{Value, json};

use crate::job::LoadedJob;
use crate::output::print;
use crate::report::pictures;
use crate::workspace::write_atomically;

/// `hgct simulate`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hgct simulate plan.json
  hgct simulate plan.json --svg step.svg --trace step.json
  hgct simulate plan.json --slow A100-40-3=1.3 --lose V100-16-0
  hgct simulate plan.json --profile profile.json --slow local/torch:0=1.3

Exit codes: 0 the step is simulated; 2 bad input.")]
pub(crate) struct SimulateArgs {
    /// A plan that `hgct plan --output` wrote; that of a job needs --profile
    plan: PathBuf,
    /// What the devices of a job's plan were measured at
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// What if a kind, a node (KIND-3) or a device (KIND-3/0) took a factor longer
    #[arg(long, value_name = "DEVICE=FACTOR", value_parser = slow)]
    slow: Vec<(String, f64)>,
    /// What if nodes were gone
    #[arg(long, value_name = "NODE,…", value_delimiter = ',')]
    lose: Vec<String>,
    /// Write the timeline to this file
    #[arg(long, value_name = "FILE")]
    timeline: Option<PathBuf>,
    /// Write a Chrome trace to this file
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Write a picture to this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// `hgct export`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hgct export plan.json --to megatron
  hgct export plan.json --to torchtitan --output folder

Without --output the files are printed. What a program cannot express is refused with the reason: docs/export.md.

Exit codes: 0 exported; 2 bad input, or the program cannot express the plan.")]
pub(crate) struct ExportArgs {
    /// A plan that `hgct plan --output` wrote
    plan: PathBuf,
    /// Who shall execute it
    #[arg(long, value_name = "PROGRAM", value_parser = PossibleValuesParser::new(Target::ALL.map(|(name, _)| name)))]
    to: String,
    /// Write the files into this folder
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Print one JSON object, a row a file
    #[arg(long)]
    json: bool,
}

/// A plan of either form.
enum Document {
    /// Of thousands of devices, with its problem.
    Layout(Box<Laid>),
    /// Of a job.
    Plan(Box<Plan>),
}

/// A layout, and what its document says beside it.
struct Laid {
    instance: Instance,
    layout: Layout,
    groups: Option<Vec<Group>>,
    /// Whether embedding and head are one tensor, where the document says it.
    tied_embeddings: Option<bool>,
}

/// Simulates a step.
pub(crate) fn simulate(args: &SimulateArgs) -> Result<u8> {
    let result = match read(&args.plan)? {
        Document::Layout(laid) => of_layout(args, &laid)?,
        Document::Plan(plan) => of_plan(args, &plan)?,
    };
    let kinds: Vec<&str> = result.kinds.iter().map(String::as_str).collect();
    if args.trace.is_some() || args.svg.is_some() {
        let (trace, svg) = pictures(&result.timeline, &kinds);
        for (path, text) in [(&args.trace, trace), (&args.svg, svg)] {
            if let (Some(path), Some(text)) = (path, text) {
                write_atomically(path, text.as_bytes(), 0o644)?;
            }
        }
    }
    if let Some(path) = &args.timeline {
        write_atomically(path, canonical::encode(&result.timeline).as_bytes(), 0o644)?;
    }
    let text = if args.json { canonical::encode(&result.figures) } else { result.text };
    print(&text)?;
    Ok(0)
}

/// What is printed, drawn and written of a simulation.
struct Outcome {
    timeline: Timeline,
    kinds: Vec<String>,
    figures: Value,
    text: String,
}

fn of_layout(args: &SimulateArgs, laid: &Laid) -> Result<Outcome> {
    let (instance, layout, groups) = (&laid.instance, &laid.layout, laid.groups.as_deref());
    if args.profile.is_some() {
        bail!(
            "{} has its own figures: leave --profile out, it is for the plan of a job",
            args.plan.display()
        );
    }
    let what_if = WhatIf { slow: args.slow.clone(), lose: args.lose.clone() };
    let changed = what_if != WhatIf::default();
    let simulated = simulate_placed(instance, layout, groups, &what_if).map_err(|error| match error {
        hgct_planner::Error::Layout { .. } => anyhow!(error).context(args.plan.display().to_string()),
        error => error.into(),
    })?;
    let plain = if changed {
        simulate_placed(instance, layout, groups, &WhatIf::default())?.step_ns
    } else {
        simulated.step_ns
    };
    let priced_s = price(instance, layout).iteration_s;
    let s = |ns: u64| ns as f64 / 1e9;
    let figures = json!({
        "step_s": s(simulated.step_ns),
        "pipeline_s": s(simulated.pipeline_ns),
        "roofline_s": s(simulated.roofline_ns),
        "serial_s": s(simulated.serial_ns),
        "contention_s": s(simulated.contention_ns),
        "priced_s": priced_s,
        "unchanged_step_s": s(plain),
        "pipelines": simulated.num_pipelines,
        "samples": simulated.num_samples,
    });
    let mut text = format!(
        "step {}: {} to the last backward, the rest exchange and update\n\
         priced {}; busiest devices {}, everything in series {}\n\
         {}, {}; transfers waited {} for ports that others used\n",
        nanoseconds(simulated.step_ns),
        nanoseconds(simulated.pipeline_ns),
        seconds(priced_s),
        nanoseconds(simulated.roofline_ns),
        nanoseconds(simulated.serial_ns),
        count(simulated.num_pipelines as u64, "pipeline"),
        count(simulated.num_samples, "sample"),
        nanoseconds(simulated.contention_ns),
    );
    if changed {
        text.push_str(&what_changed(plain, simulated.step_ns));
    }
    let kinds = simulated.timeline.ranks.iter().map(|rank| {
        let stage = rank.actions.first().map_or(0, |span| span.action.stage.0);
        format!("stage {stage}")
    });
    Ok(Outcome { kinds: kinds.collect(), figures, text, timeline: simulated.timeline.clone() })
}

fn of_plan(args: &SimulateArgs, plan: &Plan) -> Result<Outcome> {
    let Some(path) = &args.profile else {
        bail!(
            "{} is the plan of a job: give what its devices were measured at, by --profile",
            args.plan.display()
        );
    };
    if !args.lose.is_empty() {
        bail!("a job's plan says who owns what: without a node it has to be made anew (`hgct plan`)");
    }
    let profile: Profile = canonical::decode(&path.to_string_lossy(), &text_of(path)?)?;
    let plain = hgct_planner::simulate(plan, &profile)?;
    let mut slowed = profile;
    for (name, factor) in &args.slow {
        let hit = |row: &hgct_core::profile::DeviceProfile| {
            row.device.as_str() == name || row.kind.as_str() == name
        };
        if !slowed.devices.iter().any(hit) {
            let known = slowed.devices.iter().flat_map(|row| [row.device.as_str(), row.kind.as_str()]);
            let known: BTreeSet<&str> = known.collect();
            let known: Vec<&str> = known.into_iter().collect();
            bail!("--slow {name}: there is no such kind or device (there are: {})", known.join(", "));
        }
        for row in slowed.devices.iter_mut().filter(|row| hit(row)) {
            let longer = |ns: u64| (ns as f64 * factor).round() as u64;
            for layer in &mut row.layers {
                for spread in [&mut layer.forward, &mut layer.backward] {
                    *spread = Spread {
                        median_ns: longer(spread.median_ns),
                        min_ns: longer(spread.min_ns),
                        max_ns: longer(spread.max_ns),
                        ..*spread
                    };
                }
            }
            row.update_ps_per_element = longer(row.update_ps_per_element);
            row.reduce_ps_per_element = longer(row.reduce_ps_per_element);
        }
    }
    let simulated = hgct_planner::simulate(plan, &slowed)?;
    let s = |ns: u64| ns as f64 / 1e9;
    let figures = json!({
        "step_s": s(simulated.step_ns),
        "roofline_s": s(simulated.roofline_ns),
        "serial_s": s(simulated.serial_ns),
        "unchanged_step_s": s(plain.step_ns),
        "pipelines": plan.pipelines.len(),
        "samples": plan.global_batch,
    });
    let mut text = format!(
        "step {}; busiest device {}, everything in series {}\n",
        nanoseconds(simulated.step_ns),
        nanoseconds(simulated.roofline_ns),
        nanoseconds(simulated.serial_ns)
    );
    if !args.slow.is_empty() {
        text.push_str(&what_changed(plain.step_ns, simulated.step_ns));
    }
    let kinds = plan.ranks.iter().map(|rank| rank.kind.to_string()).collect();
    Ok(Outcome { timeline: simulated.timeline, kinds, figures, text })
}

fn what_changed(plain_ns: u64, step_ns: u64) -> String {
    format!(
        "without the what-if {}: {:+.1} %\n",
        nanoseconds(plain_ns),
        100.0 * (step_ns as f64 / plain_ns.max(1) as f64 - 1.0)
    )
}

/// Writes a plan in another program's words.
pub(crate) fn export_plan(args: &ExportArgs) -> Result<u8> {
    let exported = match read(&args.plan)? {
        Document::Layout(laid) => Exported::of_layout(&laid.instance, &laid.layout, laid.tied_embeddings),
        Document::Plan(plan) => Exported::of_plan(&plan)?,
    };
    let Some((_, target)) = Target::ALL.into_iter().find(|(name, _)| *name == args.to) else {
        bail!("there is no program {}", args.to);
    };
    let files = export(&exported, target)?;
    if let Some(folder) = &args.output {
        for file in &files {
            let path = folder.join(file.name);
            write_atomically(&path, file.text.as_bytes(), 0o644)?;
            eprintln!("wrote {}", path.display());
        }
    }
    if args.json {
        let rows: Vec<Value> =
            files.iter().map(|file| json!({ "file": file.name, "text": file.text })).collect();
        print(&canonical::encode(&json!({ "program": args.to, "rows": rows })))?;
        return Ok(0);
    }
    if args.output.is_some() {
        return Ok(0);
    }
    for file in &files {
        if files.len() > 1 {
            print(&format!("==> {} <==\n", file.name))?;
        }
        print(&file.text)?;
    }
    Ok(0)
}

/// The plan that a job executes, of a document of either form. An answer of `hgct plan --model` has it
/// where devices were measured; it is made the job's here.
pub(crate) fn read_plan(path: &Path, loaded: &LoadedJob) -> Result<Plan> {
    let (file, text) = (path.to_string_lossy(), text_of(path)?);
    let value: Value = canonical::decode(&file, &text)?;
    if value.get("layout").is_none() {
        let plan = Plan::from_json(&file, &text);
        return plan.with_context(|| format!("{file} is no plan of `hgct plan`"));
    }
    let answer = Answer::from_json(&file, &text)?;
    let parallel = |stage: &Stage| stage.num_devices() > 1;
    if answer.layout.templates.iter().flat_map(|template| &template.stages).any(parallel) {
        bail!(
            "{file}: hgct train does not run tensor-parallel stages yet; hgct export writes it for programs that do"
        );
    }
    let Some(mut plan) = answer.plan else {
        bail!(
            "{file} names no devices: it was not planned from a profile. Measure them with hgct profile, and plan \
             with --profile"
        );
    };
    plan.job = loaded.job.hash();
    Ok(*plan)
}

/// Reads a plan of either form: one with its problem has `instance` and `layout`.
fn read(path: &Path) -> Result<Document> {
    let file = path.to_string_lossy();
    let text = text_of(path)?;
    let value: Value = canonical::decode(&file, &text)?;
    let (Some(instance), Some(layout)) = (value.get("instance"), value.get("layout")) else {
        let plan = Plan::from_json(&file, &text);
        return Ok(Document::Plan(Box::new(
            plan.with_context(|| format!("{file} is no plan of `hgct plan`"))?,
        )));
    };
    let instance: Instance = canonical::decode(&format!("{file}: instance"), &instance.to_string())?;
    let layout: Layout = canonical::decode(&format!("{file}: layout"), &layout.to_string())?;
    if let Some(fault) = check_instance(&instance).first() {
        bail!("{file}: {fault}");
    }
    let groups = value
        .get("groups")
        .map(|groups| canonical::decode::<Vec<Group>>(&format!("{file}: groups"), &groups.to_string()));
    Ok(Document::Layout(Box::new(Laid {
        instance,
        layout,
        groups: groups.transpose()?,
        tied_embeddings: value.pointer("/model/tied_embeddings").and_then(Value::as_bool),
    })))
}

/// A text of at most 256 MiB.
fn text_of(path: &Path) -> Result<String> {
    const MOST: u64 = 256 << 20;
    let size = std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len();
    if size > MOST {
        bail!("{} has {size} bytes; at most {MOST} are read", path.display());
    }
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn slow(text: &str) -> Result<(String, f64), String> {
    let bad = || {
        let (least, most) = (SLOW_FACTORS.start(), SLOW_FACTORS.end());
        format!("give DEVICE=FACTOR with a factor from {least} to {most}, such as A100-40-3=1.3")
    };
    let (name, factor) = text.rsplit_once('=').ok_or_else(bad)?;
    let factor = factor.parse::<f64>().ok().filter(|factor| SLOW_FACTORS.contains(factor));
    factor.filter(|_| !name.is_empty()).map(|factor| (name.to_owned(), factor)).ok_or_else(bad)
}
