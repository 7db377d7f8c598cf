//! The end report: from the documents of a run's folder to `report.md`, two pictures and a trace.
//!
//! | Read | Written |
//! | --- | --- |
//! | `plan.json` (must be there) | `report.md` |
//! | `summary.json`, `metrics.jsonl` | `loss.svg` |
//! | `predicted_timeline.json`, `timeline.json` | `timeline.svg`, `trace.json` |
//! | `profile.json` (speeds alone, where the summary has none) | |
//!
//! What a document would say that is not there is left out or said to be unknown: a run that failed
//! has a report too. The same documents give the same report, byte for byte.

mod facts;
mod loss_plot;
mod markdown;
mod shares;
pub(crate) mod summary;
mod svg;
#[cfg(test)]
mod tests;
mod text;
mod timeline_picture;
mod trace;

use std::path::Path;

use anyhow::{Context as _, Result};
use hgct_core::canonical;
use hgct_core::ids::RunId;
use hgct_core::plan::Plan;
use hgct_core::profile::Profile;
use hgct_core::timeline::Timeline;
use serde::Deserialize;

use crate::metrics::Metrics;
use crate::output::print;
use crate::workspace::{Workspace, write_atomically};
use facts::Report;
use summary::RunSummary;

/// `hgct report`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hgct report latest
  hgct report .hgct/runs/ID --json

Exit codes: 0 the report is written and printed; 2 there is no such run, or its documents do not read.")]
pub(crate) struct Args {
    /// A run's id, `latest`, or the path of a run
    run: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Writes a run's report again and prints it.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<u8> {
    let written = write(&workspace.find_run(&args.run)?)?;
    let text = if args.json { canonical::encode(&written.report) } else { written.markdown };
    print(&text)?;
    Ok(0)
}

/// A report that was written.
#[derive(Debug)]
pub(crate) struct Written {
    /// Its text.
    pub(crate) markdown: String,
    /// Its figures.
    pub(crate) report: Report,
}

/// Writes `report.md`, `loss.svg`, `timeline.svg` and `trace.json` into a run's folder, each whole
/// or not at all; a picture without anything to show is not written.
pub(crate) fn write(folder: &Path) -> Result<Written> {
    let inputs = Inputs::read(folder)?;
    let report = Report::of(&inputs);
    let loss = loss_plot::draw(&inputs.metrics, &inputs.summary.data);
    let kinds: Vec<&str> = inputs.plan.ranks.iter().map(|rank| rank.kind.as_str()).collect();
    let picture = timeline_picture::draw(inputs.predicted.as_ref(), inputs.measured.as_ref(), &kinds);
    let trace = trace::chrome(inputs.measured.as_ref(), inputs.predicted.as_ref());
    let markdown = markdown::write(
        &report,
        &inputs,
        markdown::Pictures { loss: loss.is_some(), timeline: picture.is_some(), trace: trace.is_some() },
    );
    let files = [("loss.svg", loss), ("timeline.svg", picture), ("trace.json", trace)];
    for (name, text) in files.into_iter().chain([("report.md", Some(markdown.clone()))]) {
        if let Some(text) = text {
            write_atomically(&folder.join(name), text.as_bytes(), 0o644)?;
        }
    }
    Ok(Written { markdown, report })
}

/// A predicted timeline as a Chrome trace and as a picture; `kinds` stand below the devices.
pub(crate) fn pictures(predicted: &Timeline, kinds: &[&str]) -> (Option<String>, Option<String>) {
    (trace::chrome(None, Some(predicted)), timeline_picture::draw(Some(predicted), None, kinds))
}

/// All that a report is made from.
#[derive(Debug, Clone)]
struct Inputs {
    plan: Plan,
    summary: RunSummary,
    metrics: Metrics,
    measured: Option<Timeline>,
    predicted: Option<Timeline>,
    profile: Option<Profile>,
}

impl Inputs {
    fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("plan.json");
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!("cannot read {}: a run has a report once it has a plan", path.display())
        })?;
        let plan = Plan::from_json(&path.to_string_lossy(), &text)?;
        let summary = match document(&folder.join("summary.json"))? {
            Some(summary) => summary,
            None => RunSummary::of_plan(
                RunId::new(folder.file_name().unwrap_or_default().to_string_lossy())?,
                &plan,
            ),
        };
        let metrics = folder.join("metrics.jsonl");
        Ok(Self {
            plan,
            summary,
            metrics: if metrics.exists() { Metrics::read(&metrics)? } else { Metrics::default() },
            measured: document(&folder.join("timeline.json"))?,
            predicted: document(&folder.join("predicted_timeline.json"))?,
            profile: document(&folder.join("profile.json"))?,
        })
    }
}

/// A document of the folder; `None` where it is not there.
fn document<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(canonical::decode(&path.to_string_lossy(), &text)?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// The newest step of a timeline that all its ranks have, with its first start and last end.
fn steady_step(timeline: &Timeline) -> Option<(u64, u64, u64)> {
    let steps = timeline.ranks.first()?.actions.iter().map(|span| span.step);
    let complete =
        |step: &u64| timeline.ranks.iter().all(|rank| rank.actions.iter().any(|span| span.step == *step));
    let step = steps.filter(complete).max()?;
    let spans = || timeline.ranks.iter().flat_map(|rank| &rank.actions).filter(|span| span.step == step);
    Some((step, spans().map(|span| span.start_ns).min()?, spans().map(|span| span.end_ns).max()?))
}
