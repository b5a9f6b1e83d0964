//! Measures libqcowrecycle, through its C interface, beside the raw file, QEMU and other qcow2 libraries. `make bench`
//! builds what it needs and runs it; docs/PERFORMANCE.md says how it measures.

mod contender;
mod counts;
mod figures;
mod loopback;
mod place;
mod plot;
mod qemu;
mod report;
mod rows;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::place::Place;
use crate::rows::{Bench, ROWS, Scale};

const USAGE: &str = "\
bench [--quick | --tiny] [--rows=a,b] [--tmpfs=DIR] [--disk=DIR] [--output=DIR]
    measures; the results go to standard output, DIR/bench.json and DIR/bench.svg (quick.json, quick.svg)
bench report --results=FILE --page=FILE --readme=FILE --plot=FILE
    writes the results of a run into the documents
bench rows
    names the rows";

struct Arguments {
    verb: Option<String>,
    scale: Scale,
    rows: Vec<String>,
    tmpfs: PathBuf,
    disk: PathBuf,
    output: PathBuf,
    documents: report::Documents,
}

fn arguments() -> Result<Arguments> {
    use lexopt::prelude::*;
    let mut arguments = Arguments {
        verb: None,
        scale: Scale::Full,
        rows: Vec::new(),
        tmpfs: "/dev/shm".into(),
        disk: "build/bench".into(),
        output: "build/bench".into(),
        documents: report::Documents::default(),
    };
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        let path = |value: OsString| PathBuf::from(value);
        match argument {
            Long("quick") => arguments.scale = Scale::Quick,
            Long("tiny") => arguments.scale = Scale::Tiny,
            Long("rows") => {
                let names = parser.value()?.string()?;
                arguments.rows.extend(names.split(',').filter(|name| !name.is_empty()).map(str::to_owned));
            }
            Long("tmpfs") => arguments.tmpfs = path(parser.value()?),
            Long("disk") => arguments.disk = path(parser.value()?),
            Long("output") => arguments.output = path(parser.value()?),
            Long("results") => arguments.documents.results = path(parser.value()?),
            Long("page") => arguments.documents.page = path(parser.value()?),
            Long("readme") => arguments.documents.readme = path(parser.value()?),
            Long("plot") => arguments.documents.plot = path(parser.value()?),
            Long("help") | Short('h') => {
                println!("{USAGE}");
                std::process::exit(0);
            }
            Value(verb) if arguments.verb.is_none() => arguments.verb = Some(verb.string()?),
            other => return Err(other.unexpected()).context(USAGE),
        }
    }
    for name in &arguments.rows {
        if !ROWS.iter().any(|row| row.name == name) {
            bail!("no row {name}; there are {}", ROWS.map(|row| row.name).join(", "));
        }
    }
    Ok(arguments)
}

fn measure(arguments: &Arguments) -> Result<()> {
    std::fs::create_dir_all(&arguments.output)?;
    let mut bench =
        Bench { tmpfs: Place::new(&arguments.tmpfs)?, disk: Place::new(&arguments.disk)?, scale: arguments.scale };
    let mut result = report::Run::begin(arguments.scale, &bench)?;
    let mut failed = Vec::new();
    for row in &ROWS {
        if !arguments.rows.is_empty() && !arguments.rows.iter().any(|name| name == row.name) {
            continue;
        }
        let started = Instant::now();
        eprintln!("{}: {}", row.name, row.title);
        let outcome = (row.measure)(&mut bench);
        bench.tmpfs.clear()?;
        bench.disk.clear()?;
        match outcome {
            Ok(lines) => {
                for line in lines {
                    println!("{}", report::one_line(&line));
                    result.lines.push(line);
                }
            }
            Err(error) => {
                eprintln!("  FAILED: {error:#}");
                failed.push(row.name);
            }
        }
        eprintln!("  {:.1} s", started.elapsed().as_secs_f64());
    }
    result.write(&arguments.output)?;
    if !failed.is_empty() {
        bail!("rows that failed: {}", failed.join(", "));
    }
    Ok(())
}

fn main() -> Result<()> {
    let arguments = arguments()?;
    match arguments.verb.as_deref() {
        None => measure(&arguments),
        Some("report") => report::publish(&arguments.documents),
        Some("rows") => {
            ROWS.iter().for_each(|row| println!("{:12} {}", row.name, row.title));
            Ok(())
        }
        Some(other) => bail!("what is {other}?\n{USAGE}"),
    }
}
