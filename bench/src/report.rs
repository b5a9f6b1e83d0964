//! Results: on standard output, as JSON, as a plot, and in the documents.

use std::fs;
use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::contender::Contender::Library;
use crate::figures::{Line, Spread, Target};
use crate::qemu;
use crate::rows::{Bench, Scale};

/// One run of the program.
#[derive(Debug, Serialize, Deserialize)]
pub struct Run {
    pub scale: Scale,
    pub date: String,
    pub machine: Vec<String>,
    pub lines: Vec<Line>,
}

impl Run {
    pub fn begin(scale: Scale, bench: &Bench) -> Result<Self> {
        let date = qemu::run(std::process::Command::new("date").arg("+%Y-%m-%d"))?;
        Ok(Self {
            scale,
            date: String::from_utf8_lossy(&date.stdout).trim().to_owned(),
            machine: machine(bench)?,
            lines: Vec::new(),
        })
    }

    pub fn write(&self, folder: &Path) -> Result<()> {
        let name = if self.scale == Scale::Full { "bench.json" } else { "quick.json" };
        fs::write(folder.join(name), serde_json::to_vec_pretty(self)?)?;
        println!("\n{}", self.machine.join("; "));
        Ok(())
    }
}

fn machine(bench: &Bench) -> Result<Vec<String>> {
    let first_value = |file: &str, name: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
    };
    let cores = std::thread::available_parallelism()?.get();
    let memory = first_value("/proc/meminfo", "MemTotal");
    let memory = memory.split(' ').next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) >> 20;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let version = qemu::run(qemu::qemu_img().arg("--version"))?;
    let version = String::from_utf8_lossy(&version.stdout);
    let version = version.split_whitespace().nth(2).unwrap_or("of unknown version");
    Ok(vec![
        format!("{cores} cores of {}", first_value("/proc/cpuinfo", "model name")),
        format!("{memory} GiB of memory"),
        format!("Linux {}", kernel.trim()),
        format!("{} and {}", bench.tmpfs.name, bench.disk.name),
        format!("QEMU {version}, qcow2-rs 0.1.6, imago 0.2.6"),
    ])
}

fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn with_spread(spread: &Spread) -> String {
    if spread.samples < 2 {
        return number(spread.median);
    }
    format!("{} [{}-{}]", number(spread.median), number(spread.low), number(spread.high))
}

fn target(line: &Line) -> String {
    match line.target {
        None => String::new(),
        Some(Target::AtMost(bound)) => format!("≤ {}", number(bound)),
        Some(Target::AtLeast(bound)) => format!("≥ {}", number(bound)),
    }
}

fn verdict(line: &Line) -> &'static str {
    match line.met() {
        None => "",
        Some(true) => "met",
        Some(false) => "MISSED",
    }
}

/// A line of the table on standard output: the library, its target, the others.
pub fn one_line(line: &Line) -> String {
    let ours = line.values.get(&Library).map(with_spread).unwrap_or_else(|| "-".into());
    let others: Vec<String> = line
        .values
        .iter()
        .filter(|(who, _)| **who != Library)
        .map(|(who, value)| format!("{} {}", who.name(), with_spread(value)))
        .chain(line.raw_microseconds.map(|raw| format!("raw {} µs", number(raw))))
        .collect();
    let (target, verdict) = (target(line), verdict(line));
    format!("  {:62} {:>22} {:13} {target:8} {verdict:6} | {}", line.work, ours, line.unit, others.join(", "))
}
