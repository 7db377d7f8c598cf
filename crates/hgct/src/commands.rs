//! The stages of a run, each alone: `hgct check`, `hgct profile`, `hgct plan`.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;
use hgct_core::canonical;
use hgct_core::check::{CheckReport, Verdict};
use hgct_core::cluster::{ClusterSpec, Isolation};
use hgct_core::ids::{DeviceId, Kind, RunId};
use hgct_core::profile::{DeviceProfile, LinkProfile, Profile};
use serde::Serialize;

use crate::job::LoadedJob;
use crate::output::print;
use crate::session::Session;
use crate::stages::{Choices, Fleet};
use crate::train::{AgentArgs, DeviceArgs, session_options};
use crate::workspace::Workspace;

/// `hgct check`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  hgct check
  hgct check local/torch:0 --json

Exit codes: 0 every device passed; 1 a device failed, there is none, or an environment does not work; 2 bad input.")]
pub(crate) struct CheckArgs {
    /// Devices to check; none: all
    #[arg(value_name = "DEVICE")]
    devices: Vec<DeviceId>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// A cluster document with grants, in place of what is discovered
    #[arg(long, value_name = "FILE")]
    cluster: Option<PathBuf>,
    #[command(flatten)]
    agents: AgentArgs,
}

/// Checks devices afresh and prints a table a device.
pub(crate) fn check(workspace: &Workspace, args: &CheckArgs) -> Result<u8> {
    let choices = Choices {
        cluster: args.cluster.clone(),
        devices: args.devices.clone(),
        force: true,
        fresh: true,
        tells_unusable: true,
        ..Choices::default()
    };
    let (reports, lost) = with_session(workspace, "check", &args.agents, |session| {
        let (mut fleet, _) = Fleet::discover(session, &choices)?;
        if !fleet.devices().is_empty() {
            fleet.check(session, workspace, &choices)?;
        }
        let broken = broken(&fleet, &args.devices);
        let lost = fleet.set_aside.into_iter().map(|(device, reason)| (device.to_string(), None, reason));
        Ok((fleet.checks, lost.chain(broken).collect::<Vec<Lost>>()))
    })?;
    if args.json {
        #[derive(Serialize)]
        struct Row<'a> {
            device: &'a str,
            kind: Option<&'a Kind>,
            verdict: Verdict,
            reason: Option<&'a str>,
            checks: &'a [hgct_core::check::CheckRow],
        }
        let found = reports.iter().map(|report| Row {
            device: report.device.as_str(),
            kind: Some(&report.kind),
            verdict: report.verdict,
            reason: None,
            checks: &report.checks,
        });
        let lost = lost.iter().map(|(device, kind, reason)| Row {
            device,
            kind: kind.as_ref(),
            verdict: Verdict::Fail,
            reason: Some(reason),
            checks: &[],
        });
        let rows: Vec<Row<'_>> = found.chain(lost).collect();
        print(&canonical::encode(&serde_json::json!({ "rows": rows })))?;
    } else {
        for report in &reports {
            print(&format!("{report}\n"))?;
        }
        for (device, _, reason) in &lost {
            print(&format!("{device}: FAIL: {reason}\n"))?;
        }
    }
    if reports.is_empty() && lost.is_empty() {
        eprintln!("hgct: no device was checked: see the reasons above");
        return Ok(1);
    }
    let failed = |report: &CheckReport| report.verdict == Verdict::Fail;
    Ok(u8::from(!lost.is_empty() || reports.iter().any(failed)))
}

/// Device or environment, kind, and why there is no report of it.
type Lost = (String, Option<Kind>, String);

/// Environments that give no device, as `NODE/ENVIRONMENT`: all, or those of the devices asked for.
fn broken(fleet: &Fleet, asked: &[DeviceId]) -> Vec<Lost> {
    let rows = fleet.unusable.iter().filter_map(|(node, row)| {
        let name = format!("{node}/{}", row.environment.as_ref()?);
        let of = |device: &DeviceId| device.as_str().split_once(':').is_some_and(|(of, _)| of == name);
        let wanted = asked.is_empty() || asked.iter().any(of);
        wanted.then(|| (name, Some(row.kind.clone()), row.reason.clone()))
    });
    rows.collect()
}

/// What `hgct profile` and `hgct plan` share.
#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// The job to measure and plan for
    pub(crate) job: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// Write the document to this file too
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) devices: DeviceArgs,
    #[command(flatten)]
    pub(crate) agents: AgentArgs,
}

/// Measures the devices for a job.
pub(crate) fn profile(workspace: &Workspace, args: &PlanArgs) -> Result<u8> {
    let loaded = LoadedJob::read(&args.job)?;
    let (_, profile) = measured(workspace, &loaded, args)?;
    keep(args.output.as_ref(), &profile)?;
    if args.json {
        #[derive(Serialize)]
        struct Printed<'a> {
            measured_at: &'a str,
            seq_len: u32,
            isolation: hgct_core::cluster::Isolation,
            rows: &'a [DeviceProfile],
            links: &'a [LinkProfile],
        }
        let Profile { measured_at, seq_len, isolation, devices: rows, links, .. } = &profile;
        print(&canonical::encode(&Printed {
            measured_at,
            seq_len: *seq_len,
            isolation: *isolation,
            rows,
            links,
        }))?;
    } else {
        print(&table(&profile))?;
    }
    Ok(0)
}

/// The cluster and its profile, measured or kept from an earlier time.
pub(crate) fn measured(
    workspace: &Workspace,
    loaded: &LoadedJob,
    args: &PlanArgs,
) -> Result<(ClusterSpec, Profile)> {
    let choices = Choices {
        cluster: args.devices.cluster.clone(),
        devices: loaded.job.policy.devices.clone(),
        force: args.devices.force,
        fresh: args.devices.fresh,
        ..Choices::default()
    };
    with_session(workspace, "plan", &args.agents, |session| {
        let (mut fleet, _) = Fleet::discover(session, &choices)?;
        fleet.check(session, workspace, &choices)?;
        let profile = fleet.profile(session, workspace, &loaded.job, &loaded.model, &choices)?;
        Ok((fleet.cluster, profile))
    })
}

/// A session for one command, whose folder goes with it when all went well.
fn with_session<T>(
    workspace: &Workspace,
    what: &str,
    agents: &AgentArgs,
    body: impl FnOnce(&mut Session) -> Result<T>,
) -> Result<T> {
    let run = RunId::new(format!("{}-{what}-{}", crate::date::stamp(), std::process::id()))?;
    let folder = workspace.root().join("sessions").join(run.as_str());
    let mut session = Session::open(workspace, &session_options(run, folder.clone(), agents))?;
    let result = body(&mut session);
    let closed = session.close();
    let result = result?;
    closed?;
    std::fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    Ok(result)
}

pub(crate) fn keep<T: Serialize>(output: Option<&PathBuf>, document: &T) -> Result<()> {
    match output {
        Some(path) => crate::workspace::write_atomically(path, canonical::encode(document).as_bytes(), 0o644),
        None => Ok(()),
    }
}

/// A profile for people: milliseconds a micro-batch.
fn table(profile: &Profile) -> String {
    use std::fmt::Write as _;
    let mut text = format!(
        "measured {} at sequence length {}, {}\n",
        profile.measured_at,
        profile.seq_len,
        match profile.isolation {
            Isolation::Cgroup => "grants held by control groups",
            Isolation::Affinity => "grants held by affinity alone",
            Isolation::Unisolated => "unisolated",
        }
    );
    let ms = |ns: u64| ns as f64 / 1e6;
    for row in &profile.devices {
        let _ = writeln!(
            text,
            "\n{} ({}, {}, {} millicores)\n  {:<10} {:>11} {:>12} {:>12} {:>16}",
            row.device,
            row.kind,
            row.framework,
            row.grant.cpu_millicores,
            "layer",
            "micro-batch",
            "forward ms",
            "backward ms",
            "activations MiB"
        );
        for layer in &row.layers {
            let _ = writeln!(
                text,
                "  {:<10} {:>11} {:>12.2} {:>12.2} {:>16.1}",
                format!("{:?}", layer.layer).to_lowercase(),
                layer.micro_batch,
                ms(layer.forward.median_ns),
                ms(layer.backward.median_ns),
                layer.activation_bytes as f64 / f64::from(1 << 20)
            );
        }
    }
    if !profile.links.is_empty() {
        text.push_str("\nlinks\n");
    }
    for link in &profile.links {
        let _ = writeln!(
            text,
            "  {} → {}: {}, {:.0} µs, {:.2} GB/s",
            link.from,
            link.to,
            link.transport,
            link.latency_ns as f64 / 1e3,
            link.bytes_per_s as f64 / 1e9
        );
    }
    text
}
