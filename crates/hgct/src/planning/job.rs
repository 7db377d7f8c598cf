//! `hgct plan job.toml`: a job on devices that were measured.

use std::io::Write as _;
use std::time::Instant;

use anyhow::Result;
use hgct_core::canonical;

use crate::commands::{PlanArgs, keep, measured};
use crate::job::LoadedJob;
use crate::train::make_plan;
use crate::workspace::Workspace;

/// Plans a job and says why this plan.
pub(super) fn plan(workspace: &Workspace, args: &PlanArgs) -> Result<u8> {
    let loaded = LoadedJob::read(&args.job)?;
    let (cluster, profile) = measured(workspace, &loaded, args)?;
    let started = Instant::now();
    let planned = make_plan(&loaded, &cluster, &profile)?;
    let search_seconds = started.elapsed().as_secs_f64();
    keep(args.output.as_ref(), &planned.plan)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        write!(out, "{}", canonical::encode(&super::document::of_job(&planned, search_seconds)))?;
    } else {
        writeln!(out, "{}", planned.explanation)?;
    }
    Ok(0)
}
