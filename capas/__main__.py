from capas.cli import main

raise SystemExit(main())
