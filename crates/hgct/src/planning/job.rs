//! `hgct plan job.toml`: a job on devices that were measured.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use hgct_core::canonical;
use hgct_core::profile::Profile;

use crate::commands::{PlanArgs, keep, measured};
use crate::job::LoadedJob;
use crate::output::print;
use crate::stages::parse_cluster;
use crate::train::make_plan;
use crate::workspace::Workspace;

/// Plans a job and says why this plan.
pub(super) fn plan(workspace: &Workspace, args: &PlanArgs, profile: Option<&Path>) -> Result<u8> {
    let loaded = LoadedJob::read(&args.job)?;
    let (cluster, profile) = match (profile, &args.devices.cluster) {
        (Some(profile), Some(cluster)) => (parse_cluster(cluster)?, read_profile(profile)?),
        _ => measured(workspace, &loaded, args)?,
    };
    let started = Instant::now();
    let planned = make_plan(&loaded, &cluster, &profile)?;
    let search_seconds = started.elapsed().as_secs_f64();
    keep(args.output.as_ref(), &planned.plan)?;
    print(&if args.json {
        canonical::encode(&super::document::of_job(&planned, search_seconds))
    } else {
        format!("{}\n", planned.explanation)
    })?;
    Ok(0)
}

fn read_profile(path: &Path) -> Result<Profile> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(canonical::decode(&path.to_string_lossy(), &text)?)
}
