//! `hgct validate`: how well prices agree with plans that were really run.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use hgct_core::canonical;
use hgct_planner::tables::{Tables, parse_measured_layers, parse_measured_transformers};
use hgct_planner::truth::{Constants, CrossValidation, Measured, Row, Summary, cross_validate, summaries};
use serde_json::{Value, json};

use crate::output::print;

/// `hgct validate`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hgct validate tables
  hgct validate tables --cross-validate
  hgct validate tables --json

DIR has profiles.json and network.json, and measured_mixed.jsonl, measured_a100.csv or both: docs/validation.md.

Exit codes: 0 every plan is priced; 2 bad input.")]
pub(crate) struct Args {
    /// Folder of tables and measured plans
    dir: PathBuf,
    /// Also fit the constants to one half of the plans and judge them on the other
    #[arg(long)]
    cross_validate: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Prices every measured plan of a folder.
pub(crate) fn run(args: &Args) -> Result<u8> {
    let measured = read(&args.dir)?;
    let constants = Constants::default();
    let rows = measured.rows(&constants)?;
    let crossed = args.cross_validate.then(|| cross_validate(&measured, &constants)).transpose()?;
    let sets = summaries(&rows);
    let text = if args.json {
        canonical::encode(&document(&rows, &sets, &constants, crossed.as_ref()))
    } else {
        table(&rows, &sets, crossed.as_ref())
    };
    print(&text)?;
    Ok(0)
}

/// The tables of a folder.
pub(crate) fn read_tables(dir: &Path) -> Result<Tables> {
    let (profiles, network) = (dir.join("profiles.json"), dir.join("network.json"));
    let tables = Tables::parse(
        &profiles.to_string_lossy(),
        &read_file(&profiles)?,
        &network.to_string_lossy(),
        &read_file(&network)?,
    );
    Ok(tables?)
}

fn read(dir: &Path) -> Result<Measured> {
    let tables = read_tables(dir)?;
    let (mixed, a100) = (dir.join("measured_mixed.jsonl"), dir.join("measured_a100.csv"));
    if !mixed.exists() && !a100.exists() {
        bail!("{} has no measured plans: neither measured_mixed.jsonl nor measured_a100.csv", dir.display());
    }
    let layers = if mixed.exists() {
        parse_measured_layers(&mixed.to_string_lossy(), &read_file(&mixed)?, &tables)?
    } else {
        Vec::new()
    };
    let transformers = if a100.exists() {
        parse_measured_transformers(&a100.to_string_lossy(), &read_file(&a100)?)?
    } else {
        Vec::new()
    };
    Ok(Measured { tables, layers, transformers })
}

/// A text of at most 64 MiB.
fn read_file(path: &Path) -> Result<String> {
    const MOST: u64 = 64 << 20;
    let size = std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len();
    if size > MOST {
        bail!("{} has {size} bytes; at most {MOST} are read", path.display());
    }
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn document(
    rows: &[Row],
    sets: &[Summary],
    constants: &Constants,
    crossed: Option<&CrossValidation>,
) -> Value {
    let row = |row: &Row| {
        json!({
            "id": row.id,
            "set": row.set,
            "pricing": "hgct",
            "predicted_s": row.predicted.iteration_s,
            "measured_s": row.measured_s,
            "error": row.error(),
            "predicted_peak_bytes": row.predicted.peak_bytes.map(|bytes| bytes.round() as u64),
            "measured_peak_bytes": row.measured_peak_bytes.map(|bytes| bytes.round() as u64),
            "peak_error": row.peak_error(),
            "least_peak_bytes": row.predicted.least_peak_bytes.map(|bytes| bytes.round() as u64),
            "peak_contradicts_tables": row.contradicts_its_tables(),
            "published_peak_error": row.published_peak_error(),
            "pipeline_s": row.predicted.pipeline_s,
            "exchange_s": row.predicted.exchange_s,
            "update_s": row.predicted.update_s,
            "published_s": row.published.map(|(seconds, _)| seconds),
            "published_error": row.published_error(),
            "published_peak_bytes": row.published.map(|(_, bytes)| bytes.round() as u64),
        })
    };
    let set = |set: &Summary| {
        json!({
            "set": set.set,
            "plans": set.rows,
            "mean_absolute_error": set.mean_error,
            "mean_error": set.bias,
            "published_mean_absolute_error": set.published_mean_error,
            "peak_mean_absolute_error": set.peak_mean_error,
            "peak_median_absolute_error": set.peak_median_error,
            "peak_contradictions": set.contradictions,
            "credible_peak_mean_absolute_error": set.credible_peak_mean_error,
            "published_peak_mean_absolute_error": set.published_peak_mean_error,
        })
    };
    json!({
        "rows": rows.iter().map(row).collect::<Vec<Value>>(),
        "sets": sets.iter().map(set).collect::<Vec<Value>>(),
        "constants": constants,
        "cross_validation": crossed.map(|crossed| json!({
            "sets": crossed.sets.iter().map(|(set, as_is, unseen)| json!({
                "set": set, "mean_absolute_error": as_is, "unseen_mean_absolute_error": unseen,
            })).collect::<Vec<Value>>(),
            "fitted": crossed.fitted.iter().map(|(name, value, halves)| json!({
                "constant": name, "value": value, "halves": halves,
            })).collect::<Vec<Value>>(),
        })),
    })
}

fn table(rows: &[Row], sets: &[Summary], crossed: Option<&CrossValidation>) -> String {
    let percent = |x: f64| format!("{:+.1} %", 100.0 * x);
    let maybe = |x: Option<f64>| x.map_or_else(|| "–".into(), percent);
    let gigabytes = |x: Option<f64>| x.map_or_else(|| "–".into(), |bytes| format!("{:.2}", bytes / 1e9));
    let width = rows.iter().map(|row| row.id.chars().count()).max().unwrap_or(2).max(2);
    let mut text = format!(
        "{:<width$}  {:<9} {:>11} {:>11} {:>8} {:>9}  {:>8} {:>8} {:>8}\n",
        "plan", "set", "predicted s", "measured s", "error", "published", "peak GB", "measured", "error"
    );
    for row in rows {
        let _ = writeln!(
            text,
            "{:<width$}  {:<9} {:>11.4} {:>11.4} {:>8} {:>9}  {:>8} {:>8} {:>8}{}",
            row.id,
            row.set,
            row.predicted.iteration_s,
            row.measured_s,
            percent(row.error()),
            maybe(row.published_error()),
            gigabytes(row.predicted.peak_bytes),
            gigabytes(row.measured_peak_bytes),
            maybe(row.peak_error()),
            if row.contradicts_its_tables() { " *" } else { "" },
        );
    }
    if rows.iter().any(Row::contradicts_its_tables) {
        text.push_str(
            "\n* recorded with less memory than weights, gradients, moments and activations take by the plan's own \
             tables:\n  no price agrees with both\n",
        );
    }
    text.push_str("\nmean absolute errors (predicted: hgct's price; published: the tables' own formula)\n");
    for set in sets {
        let of = |x: Option<f64>| x.map_or_else(|| "–".into(), |x| format!("{:.1} %", 100.0 * x));
        let _ = writeln!(
            text,
            "{:<9} {:>2} plans: {:>6} (signed mean {}), published {:>6}; peak memory {:>6} (median {}, without * {}), \
             published {}",
            set.set,
            set.rows,
            of(Some(set.mean_error)),
            percent(set.bias),
            of(set.published_mean_error),
            of(set.peak_mean_error),
            of(set.peak_median_error),
            of(set.credible_peak_mean_error),
            of(set.published_peak_mean_error),
        );
    }
    if let Some(crossed) = crossed {
        text.push_str("\nconstants fitted to one half of the plans, judged on the other, both ways round\n");
        for (set, as_is, unseen) in &crossed.sets {
            let _ = writeln!(
                text,
                "{set:<9} {:>5.1} % as they are, {:>5.1} % on plans that the fit has not seen",
                100.0 * as_is,
                100.0 * unseen
            );
        }
        for (name, value, halves) in &crossed.fitted {
            let _ = writeln!(
                text,
                "  {name} {value:.3e}: the halves would choose {:.3e} and {:.3e}",
                halves[0], halves[1]
            );
        }
    }
    text
}
