//! Results: on standard output, as JSON, as a plot, and in the documents.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::contender::Contender::{self, Library};
use crate::figures::{Line, Spread, Target};
use crate::plot;
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
        let name = if self.scale == Scale::Full { "bench" } else { "quick" };
        fs::write(folder.join(name).with_extension("json"), serde_json::to_vec_pretty(self)?)?;
        plot::draw(&self.lines, &folder.join(name).with_extension("svg"))?;
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

/// Files that hold results between two marks.
#[derive(Default)]
pub struct Documents {
    pub results: PathBuf,
    pub page: PathBuf,
    pub readme: PathBuf,
    pub plot: PathBuf,
}

const BEGIN: &str = "<!-- written by `make bench-report` -->";
const END: &str = "<!-- end -->";

/// Writes the results of a run into the documents.
pub fn publish(documents: &Documents) -> Result<()> {
    let bytes = fs::read(&documents.results).with_context(|| documents.results.display().to_string())?;
    let run: Run = serde_json::from_slice(&bytes)?;
    let all: Vec<&Line> = run.lines.iter().collect();
    let plot = documents.plot.file_name().unwrap_or_default().to_string_lossy();
    let page = format!("{}\n![Ratios of time]({plot})\n\n{}", run.heading(), markdown(&all));
    replace(&documents.page, &page)?;
    replace(&documents.readme, &format!("{}\n{}", run.heading(), markdown(&run.first_lines())))?;
    plot::draw(&run.lines, &documents.plot)
}

impl Run {
    fn heading(&self) -> String {
        let quick = if self.scale == Scale::Full { "" } else { " A short run." };
        format!("Measured on {}: {}.{quick}\n", self.date, self.machine.join("; "))
    }

    /// What each row is about, for those who read no further: the first line with a target.
    fn first_lines(&self) -> Vec<&Line> {
        let mut rows: Vec<&Line> = Vec::new();
        for line in self.lines.iter().filter(|line| line.target.is_some()) {
            if rows.iter().all(|first| first.row != line.row) {
                rows.push(line);
            }
        }
        rows
    }
}

fn markdown(lines: &[&Line]) -> String {
    let others = [
        Contender::Qcow2Rs,
        Contender::Qcow2RsUring,
        Contender::ImagoSync,
        Contender::ImagoAsync,
        Contender::Qemu,
        Contender::Raw,
    ];
    let others: Vec<Contender> = others
        .into_iter()
        .filter(|who| lines.iter().any(|line| line.values.contains_key(who) || *who == Contender::Raw))
        .collect();
    let mut table = String::from("| work | unit | libqcowrecycle | target | |");
    others.iter().for_each(|who| table += &format!(" {} |", who.name()));
    table += "\n|---|---|---|---|---|";
    others.iter().for_each(|_| table += "---|");
    for line in lines {
        let of = |who: &Contender| line.values.get(who).map(with_spread).unwrap_or_default();
        let verdict = verdict(line).to_lowercase();
        table += &format!("\n| {} | {} | {} | {} | {verdict} |", line.work, line.unit, of(&Library), target(line));
        for who in &others {
            // Where values are ratios to the raw file, its own column has its time.
            match line.raw_microseconds {
                Some(raw) if *who == Contender::Raw => table += &format!(" {} µs |", number(raw)),
                _ => table += &format!(" {} |", of(who)),
            }
        }
    }
    table + "\n"
}

fn replace(path: &Path, with: &str) -> Result<()> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let (before, rest) = text.split_once(BEGIN).with_context(|| format!("{} lacks {BEGIN}", path.display()))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("{} lacks {END}", path.display()))?;
    Ok(fs::write(path, format!("{before}{BEGIN}\n\n{with}\n{END}{after}"))?)
}
