rule report:
    input:
        summary="<run>/summary.csv",
        comparisons=expand("<run>/compare/{system}", system=RUN.compared),
        dynamics=expand("<run>/dynamics/{system}", system=RUN.paired),
    output:
        page=report(
            "<run>/report.html",
            caption="../report/report.rst",
            category="Report",
            labels={"result": "figures, tables, configuration, versions, hardware"},
        ),
        folder=report(
            directory("<run>/report"),
            patterns=["{figure}.svg"],
            caption="../report/speedups.rst",
            category="Comparison",
            labels={"figure": "{figure}"},
        ),
    log:
        "<run>/logs/report.log",
    benchmark:
        "<run>/benchmarks/report.tsv"
    conda:
        "../../envs/longstride.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        config=str(RUN.frozen),
        key=job_key("report"),
        run=subpath(output.page, parent=True),
    message:
        "report: one page of everything"
    shell:
        "exec longstride report --config {params.config:q} --run-folder {params.run:q}"
        " --out {output.page:q} > {log:q} 2>&1"
